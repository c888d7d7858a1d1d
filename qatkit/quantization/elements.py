"""Element types that `QuantSpec.type` names, in a table that does not import torch.

A row names the function that builds the type's :class:`~qatkit.quantization.grids.Grid`, which rounds and encodes
values. To add an element type, write that function and add one row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qatkit.common.tables import Table

Bounds = tuple[float, float]


@dataclass(frozen=True)
class FloatFormat:
    """Bit layout of a small floating-point number; infinities (of e5m2) are not codes."""

    exponent_bits: int
    mantissa_bits: int
    largest: float
    dtype: str = ""
    """torch's dtype of this layout; empty if torch has none, in which case codes are stored as uint8."""


FLOAT_FORMATS: Mapping[str, Mapping[int, FloatFormat]] = {
    "float": {
        4: FloatFormat(2, 1, 6.0),
        6: FloatFormat(2, 3, 7.5),
        8: FloatFormat(4, 3, 448.0, "float8_e4m3fn"),
    },
    "float_e5m2": {8: FloatFormat(5, 2, 57344.0, "float8_e5m2")},
}
"""Layouts of the Open Compute Project (OCP MX 1.0 and OFP8) by element type and number of bits."""

E4M3_MAX = FLOAT_FORMATS["float"][8].largest


@dataclass(frozen=True)
class Element:
    """One element type."""

    name: str
    description: str
    bits: tuple[int, ...]
    """Supported numbers of bits."""
    grid: str
    """``module:function`` that takes a `QuantSpec` and returns the `Grid` of its codes."""
    code_range: Callable[[int, bool], Bounds]
    """The smallest and largest unscaled values of a code, by number of bits and symmetry."""
    observers: tuple[str, ...] = ()
    """The only observers that fit; empty if every general observer fits."""
    computed_by: str = "minmax"
    """The observer that computes a scale directly from a tensor, for use without a search."""
    narrowest: float = 0.1
    """The narrowest range that a search for the smallest squared error tries, as a fraction of the full range."""
    integer: bool = False
    """Codes are integers: ``value = (code - zero_point) * scale``."""
    asymmetric: bool = False
    """Codes may be unsigned with a zero point (``symmetric: false``)."""
    weight_only: bool = False
    """Activations cannot have this type."""


def _integer_range(bits: int, symmetric: bool) -> Bounds:
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if symmetric else (0, (1 << bits) - 1)


def _ternary_range(bits: int, symmetric: bool) -> Bounds:
    return -1, 1


def _float_range(name: str) -> Callable[[int, bool], Bounds]:
    def code_range(bits: int, symmetric: bool) -> Bounds:
        largest = FLOAT_FORMATS[name][bits].largest
        return -largest, largest

    return code_range


ELEMENTS = Table(
    "element type",
    [
        Element(
            "int",
            "integers of 2 to 8 bits, signed or unsigned with a zero point",
            bits=tuple(range(2, 9)),
            grid="qatkit.quantization.grids:integer_grid",
            code_range=_integer_range,
            integer=True,
            asymmetric=True,
        ),
        Element(
            "ternary",
            "-1, 0 and 1, the weights of BitNet b1.58",
            bits=(2,),
            grid="qatkit.quantization.grids:integer_grid",
            code_range=_ternary_range,
            observers=("absmean", "mse", "lsq"),
            computed_by="absmean",
            narrowest=0.01,  # with one outlier in a slice, a tenth of the range would round all other values to zero
            integer=True,
            weight_only=True,
        ),
        Element(
            "float",
            "small floats: e2m1 with 4 bits, e2m3 with 6, e4m3 with 8",
            bits=tuple(FLOAT_FORMATS["float"]),
            grid="qatkit.quantization.grids:float_grid",
            code_range=_float_range("float"),
        ),
        Element(
            "float_e5m2",
            "8-bit floats with 5 exponent bits and 2 mantissa bits",
            bits=tuple(FLOAT_FORMATS["float_e5m2"]),
            grid="qatkit.quantization.grids:float_grid",
            code_range=_float_range("float_e5m2"),
        ),
    ],
)
"""Every element type by name."""
