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
