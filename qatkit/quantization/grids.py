"""Quantization grids: the values that codes represent before scaling, and the codes themselves."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from qatkit.common.tables import implementation
from qatkit.quantization.elements import FLOAT_FORMATS, NONLINEAR, FloatFormat
from qatkit.spec import QuantSpec


class Grid(Protocol):
    """Rounding and encoding for one element type."""

    def round(self, v: Tensor) -> Tensor:
        """Round float32 ``v = x / scale``, already clipped to the range of codes, to the nearest value.

        `v` may be overwritten.
        """

    def encode(self, values: Tensor, zero_point: Tensor) -> Tensor:
        """Return the codes of values on the grid, in the form stored in exported files."""

    def decode(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        """Return the unscaled values of codes in float32."""


class IntegerGrid:
    """Signed integers, or unsigned integers with a zero point."""

    def __init__(self, symmetric: bool) -> None:
        self.dtype = torch.int8 if symmetric else torch.uint8

    def round(self, v: Tensor) -> Tensor:
        return v.round_()

    def encode(self, values: Tensor, zero_point: Tensor) -> Tensor:
        return (values + zero_point).to(self.dtype)

    def decode(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        return codes.float() - zero_point


class DtypeGrid:
    """Floats for which torch has a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def round(self, v: Tensor) -> Tensor:
        return v.to(self.dtype).float()

    def encode(self, values: Tensor, zero_point: Tensor) -> Tensor:
        return values.to(self.dtype)

    def decode(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        return codes.float()


class SmallFloatGrid:
    """4-bit and 6-bit floats; codes are uint8 with the sign in the highest used bit."""

    def __init__(self, form: FloatFormat) -> None:
        self.mantissa_bits = form.mantissa_bits
        self.sign_bit = form.exponent_bits + form.mantissa_bits
        self.bias = (1 << (form.exponent_bits - 1)) - 1

    def round(self, v: Tensor) -> Tensor:
        # frexp gives v = m * 2**e with 1/2 <= m < 1, so the spacing around v is 2**(e - 1 - mantissa bits); below the
        # smallest normal number the spacing stays the same. Dividing by a power of two is exact.
        exponent = torch.frexp(v.detach())[1].clamp(min=2 - self.bias)
        spacing = torch.exp2((exponent - 1 - self.mantissa_bits).float())
        return (v / spacing).round_().mul_(spacing)

    def encode(self, values: Tensor, zero_point: Tensor) -> Tensor:
        code = torch.searchsorted(self._magnitudes(values.device), values.abs().contiguous())
        return (code + (torch.signbit(values).int() << self.sign_bit)).to(torch.uint8)

    def decode(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        half = 1 << self.sign_bit
        values = self._magnitudes(codes.device)[(codes & (half - 1)).long()]
        return torch.where(codes >= half, -values, values)

    def _magnitudes(self, device: torch.device) -> Tensor:
        """Every magnitude, in the order of its code."""
        code = torch.arange(1 << self.sign_bit, device=device)
        mantissa = (code & ((1 << self.mantissa_bits) - 1)).float() / (1 << self.mantissa_bits)
        exponent = code >> self.mantissa_bits
        normal = (1 + mantissa) * torch.exp2((exponent - self.bias).float())
        return torch.where(exponent > 0, normal, mantissa * 2.0 ** (1 - self.bias))


class Codebook:
    """An arbitrary list of values; a code is the index of its value.

    Args:
        values: Values in ascending order.

    Example:
        >>> grid = Codebook([-1.0, -0.25, 0.0, 0.25, 1.0])
        >>> values = grid.round(torch.tensor([-0.7, 0.1, 0.2]))
        >>> values.tolist(), grid.encode(values, torch.zeros(1)).tolist()
        ([-1.0, 0.0, 0.25], [0, 2, 3])
    """

    def __init__(self, values: list[float]) -> None:
        self.values = torch.tensor(values, dtype=torch.float32)

    def round(self, v: Tensor) -> Tensor:
        return self.decode(self.encode(v, v), v)

    def encode(self, values: Tensor, zero_point: Tensor) -> Tensor:
        middles = (self.values[1:] + self.values[:-1]) / 2
        return torch.bucketize(values.detach(), middles.to(values.device)).to(torch.uint8)

    def decode(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        return self.values.to(codes.device)[codes.long()]


def integer_grid(spec: QuantSpec) -> Grid:
    """Return the grid of integer or ternary codes."""
    return IntegerGrid(spec.symmetric)


def nonlinear_grid(spec: QuantSpec) -> Grid:
    """Return the grid of IQ4_NL's values."""
    return Codebook(list(NONLINEAR))


def float16_grid(spec: QuantSpec) -> Grid:
    """Return the grid of float16 numbers."""
    return DtypeGrid(torch.float16)


def float_grid(spec: QuantSpec) -> Grid:
    """Return the grid of 4-bit, 6-bit or 8-bit floats."""
    form = FLOAT_FORMATS[spec.type][spec.num_bits]
    return DtypeGrid(getattr(torch, form.dtype)) if form.dtype else SmallFloatGrid(form)


_GRIDS: dict[tuple[str, int, bool], Grid] = {}


def grid_of(spec: QuantSpec) -> Grid:
    """Return the grid of a spec's codes; the first call for an element type loads its implementation.

    Example:
        >>> grid = grid_of(QuantSpec(num_bits=4, type="float"))
        >>> grid.round(torch.tensor([0.3, 2.5, 5.1])).tolist()
        [0.5, 2.0, 6.0]
    """
    key = (spec.type, spec.num_bits, spec.symmetric)
    if key not in _GRIDS:  # torch.compile cannot follow an import: `FakeQuantize` calls this before anything is traced
        _GRIDS[key] = implementation(spec.element.grid)(spec)
    return _GRIDS[key]
