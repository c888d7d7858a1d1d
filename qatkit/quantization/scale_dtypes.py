"""The table of dtypes for `QuantSpec.scale_dtype`, which does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from qatkit.common.tables import Table

SUPER_BLOCK = 256
"""Inputs that share the float16 scale of integer scales."""


@dataclass(frozen=True)
class ScaleDtype:
    """A dtype of scales. Integers and e4m3 are multiplied by an outer scale."""

    name: str
    bits: int
    floats: bool = True
    """Whether scales are floats of this dtype; otherwise, they are integers times the scale of a super-block."""
    levels: tuple[int, int] = (0, 0)
    """The smallest and largest integer; 0 is not used, because codes are quotients by the scale."""
    outer: str = ""
    """What shares an outer scale: "tensor", "super-block", or empty for nothing."""

    @property
    def signed(self) -> bool:
        """Whether integer scales may be negative."""
        return self.levels[0] < 0


SCALE_DTYPES = Table(
    "scale_dtype",
    [
        ScaleDtype("float32", 32),
        ScaleDtype("float16", 16),
        ScaleDtype("float16_late", 16),
        ScaleDtype("bfloat16", 16),
        ScaleDtype("float8_e4m3fn", 8, outer="tensor"),
        ScaleDtype("float8_e8m0fnu", 8),
        ScaleDtype("ue4m3", 8),
        ScaleDtype("uint4", 4, False, (1, 15), "super-block"),
        ScaleDtype("uint6", 6, False, (1, 63), "super-block"),
        ScaleDtype("int6", 6, False, (-32, 31), "super-block"),
        ScaleDtype("int8", 8, False, (-128, 127), "super-block"),
    ],
)
"""Every dtype of scales by name."""
