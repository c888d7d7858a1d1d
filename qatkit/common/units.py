"""Human-readable numbers with units."""

from __future__ import annotations


def format_bytes(size: int) -> str:
    """Format a size in kB, MB or GB (decimal) with one decimal place.

    Example:
        >>> format_bytes(80_000_000_000), format_bytes(1_500_000)
        ('80.0 GB', '1.5 MB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} kB"


def format_count(number: float) -> str:
    """Format a count with three significant digits and K, M, G or T.

    Example:
        >>> format_count(7_000_000_000), format_count(1234), format_count(12)
        ('7G', '1.23K', '12')
    """
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"
