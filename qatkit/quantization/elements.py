"""The table of element types for `QuantSpec.type`, which does not import torch.

A row refers to the function that builds the type's :class:`~qatkit.quantization.grids.Grid`, which rounds and encodes
values. To add an element type, write this function and add a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qatkit.common.tables import Table

Bounds = tuple[float, float]


@dataclass(frozen=True)
class FloatFormat:
    """Bit layout of a small floating-point format; infinities (of e5m2) are not codes."""

    exponent_bits: int
    mantissa_bits: int
    largest: float
    dtype: str = ""
    """The torch dtype with this layout; empty if there is none, in which case codes are stored as uint8."""


FLOAT_FORMATS: Mapping[str, Mapping[int, FloatFormat]] = {
    "float": {
        4: FloatFormat(2, 1, 6.0),
        6: FloatFormat(2, 3, 7.5),
        8: FloatFormat(4, 3, 448.0, "float8_e4m3fn"),
    },
    "float_e5m2": {8: FloatFormat(5, 2, 57344.0, "float8_e5m2")},
}
"""Layouts from the Open Compute Project (OCP MX 1.0 and OFP8) by element type and bit width."""

NONLINEAR = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
"""The values of GGUF's IQ4_NL."""

E4M3_MAX = FLOAT_FORMATS["float"][8].largest


@dataclass(frozen=True)
class Element:
    """An element type."""

    name: str
    description: str
    bits: tuple[int, ...]
    """Supported bit widths."""
    grid: str
    """``module:function`` that returns the `Grid` of the codes of a `QuantSpec`."""
    code_range: Callable[[int, bool], Bounds]
    """The smallest and largest unscaled value of a code, by bit width and symmetry."""
    observers: tuple[str, ...] = ()
    """The only supported observers; empty if all general observers are supported."""
    computed_by: str = "minmax"
    """The observer that computes a scale directly from a tensor, without a search."""
    narrowest: float = 0.1
    """The narrowest range in a search for the smallest squared error, as a fraction of the full range."""
    integer: bool = False
    """Whether codes are integers: ``value = (code - zero_point) * scale``."""
    asymmetric: bool = False
    """Whether codes may be unsigned with a zero point (``symmetric: false``)."""
    weight_only: bool = False
    """Whether the type is supported only for weights."""
    scale_rules: tuple[str, ...] = ("qmax",)
    """The supported values of `QuantSpec.scale_rule`."""
    has_zero: bool = True
    """Whether 0 is one of the values."""
    scaled: bool = True
    """Whether codes are multiplied by a scale; otherwise, it is 1."""


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
            scale_rules=("qmax", "range", "signed", "minimum"),
        ),
        Element(
            "ternary",
            "-1, 0 and 1, the weights of BitNet b1.58",
            bits=(1, 2),
            grid="qatkit.quantization.grids:integer_grid",
            code_range=_ternary_range,
            observers=("absmean", "mse", "lsq"),
            computed_by="absmean",
            narrowest=0.01,  # with one outlier in a slice, a tenth of the range would round all other values to zero
            integer=True,
            weight_only=True,
        ),
        Element(
            "nonlinear",
            "16 values that are denser around zero, of GGUF's IQ4_NL",
            bits=(4,),
            grid="qatkit.quantization.grids:nonlinear_grid",
            code_range=lambda bits, symmetric: (NONLINEAR[0], NONLINEAR[-1]),
            observers=("minmax", "mse", "lsq"),
            weight_only=True,
            scale_rules=("qmax", "signed"),
            has_zero=False,
        ),
        Element(
            "float16",
            "float16 numbers without a scale, of GGUF's F16",
            bits=(16,),
            grid="qatkit.quantization.grids:float16_grid",
            code_range=lambda bits, symmetric: (-65504.0, 65504.0),
            observers=("unit",),
            computed_by="unit",
            weight_only=True,
            scaled=False,
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
