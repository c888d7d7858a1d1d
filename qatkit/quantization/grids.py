"""The values that codes of each element type stand for before they are scaled, and the codes themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit.spec import FLOATS, QuantSpec

_DTYPES = {("float", 8): torch.float8_e4m3fn, ("float_e5m2", 8): torch.float8_e5m2}


def round_to_grid(v: Tensor, spec: QuantSpec) -> Tensor:
    """Round ``v = x / scale`` to the nearest code's value, ties to even; `v` must lie inside the range of codes.

    Args:
        v: float32.
        spec: Type and bits.

    Returns:
        float32, of the same shape.

    Example:
        >>> round_to_grid(torch.tensor([0.3, 2.5, 5.1]), QuantSpec(num_bits=4, type="float")).tolist()
        [0.5, 2.0, 6.0]
    """
    if not spec.is_float:
        return v.round()
    if (dtype := _DTYPES.get((spec.type, spec.num_bits))) is not None:
        return v.to(dtype).float()
    exponent_bits, mantissa_bits, _ = FLOATS[spec.type, spec.num_bits]
    bias = (1 << (exponent_bits - 1)) - 1
    # frexp gives v = m * 2**e with 1/2 <= m < 1, so the spacing around v is 2**(e - 1 - mantissa bits); below the
    # smallest normal number it stays as it is there. Dividing by a power of two is exact.
    exponent = torch.frexp(v.detach())[1].clamp(min=2 - bias)
    spacing = torch.exp2((exponent - 1 - mantissa_bits).float())
    return (v / spacing).round() * spacing


def to_codes(values: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of values on the grid (without the zero point): int8, uint8, or the bits of small floats.

    Floats of 8 bits keep torch's dtype; those of 4 and 6 bits are uint8 with the sign in the highest used bit.
    """
    if not spec.is_float:
        return (values + zero_point).to(torch.int8 if spec.symmetric else torch.uint8)
    if (dtype := _DTYPES.get((spec.type, spec.num_bits))) is not None:
        return values.to(dtype)
    magnitudes = _magnitudes(spec, values.device)
    code = torch.searchsorted(magnitudes, values.abs().contiguous())
    return (code + (torch.signbit(values).int() << (spec.num_bits - 1))).to(torch.uint8)


def from_codes(codes: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Values on the grid that codes stand for, float32, before they are scaled."""
    if not spec.is_float:
        return codes.float() - zero_point
    if spec.num_bits == 8:
        return codes.float()
    half = 1 << (spec.num_bits - 1)
    values = _magnitudes(spec, codes.device)[(codes & (half - 1)).long()]
    return torch.where(codes >= half, -values, values)


def _magnitudes(spec: QuantSpec, device: torch.device) -> Tensor:
    """Every magnitude of a small float, in the order of its codes."""
    exponent_bits, mantissa_bits, _ = FLOATS[spec.type, spec.num_bits]
    bias = (1 << (exponent_bits - 1)) - 1
    code = torch.arange(1 << (spec.num_bits - 1), device=device)
    exponent, mantissa = code >> mantissa_bits, (code & ((1 << mantissa_bits) - 1)).float() / (1 << mantissa_bits)
    normal = (1 + mantissa) * torch.exp2((exponent - bias).float())
    return torch.where(exponent > 0, normal, mantissa * 2.0 ** (1 - bias))
