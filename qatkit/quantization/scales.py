"""Scales and zero points from ranges, rounded to the dtype of the exported file."""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit.quantization.elements import E4M3_MAX
from qatkit.quantization.scale_dtypes import SCALE_DTYPES
from qatkit.spec import QuantSpec

SMALLEST = 2.0**-24
"""The smallest positive float16 number."""


def choose_qparams(
    low: Tensor, high: Tensor, spec: QuantSpec, outer_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the scale and zero point of slices whose values lie in ``[low, high]``.

    An all-zero slice has the scale of the widest slice (1 if every slice is zero), never 0 or NaN. If no code is zero,
    it has the smallest float16 number.

    Args:
        low: Smallest values, float32, any shape.
        high: Largest values, the same shape.
        spec: Bit width, symmetry, scale rule and the dtype to which scales are rounded.
        outer_scale: For two-level scales, the result of `tensor_scale_of`. By default, it is computed from these
            ranges.

    Returns:
        Scale and zero point (an integer), both float32 in the shape of `low`.

    Example:
        >>> import torch
        >>> spec = QuantSpec(num_bits=8, symmetric=False, strategy="tensor")
        >>> scale, zero_point = choose_qparams(torch.tensor([-0.3]), torch.tensor([1.2]), spec)
        >>> zero_point.item()
        51.0
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    largest = torch.maximum(-low, high)
    if spec.two_level and outer_scale is None:
        outer_scale = tensor_scale_of(largest, spec)
    if not spec.symmetric:
        scale = divided(high - low, spec.qmax)
    elif spec.scale_dtype == "float8_e8m0fnu":
        scale = _mx_scale(largest, spec)
    elif spec.scale_rule == "range":
        scale = divided(largest, (spec.qmax - spec.qmin) / 2)
    elif spec.scale_rule == "signed":
        scale = divided(torch.where(-low >= high, low, high), spec.qmin)
    else:
        scale = divided(largest, spec.qmax)
    widest = scale.abs().amax() if scale.numel() else scale.new_ones(())
    unused = torch.where(widest > 0, widest, torch.ones_like(widest))
    if not spec.element.has_zero:
        unused = torch.full_like(widest, SMALLEST)  # an all-zero slice becomes as small as it can
    scale = torch.where(scale != 0, scale, unused)
    scale = round_scale(scale, spec, outer_scale)
    if spec.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, round_zero_point(-low / scale, spec)


def divided(x: Tensor, number: float) -> Tensor:
    """Compute ``x / number`` with the same bits on every device.

    To divide by a Python number, CUDA multiplies by its reciprocal, which can change the last bit. Division by a GPU
    tensor is exact, but Inductor replaces such a tensor with its value. In float64, the error of the reciprocal is too
    small to change the rounded result: the quotient of a float32 and a number with few bits is never that close to the
    midpoint of two float32 values.

    Args:
        x: float32.
        number: A number with few significant bits, such as the largest code.
    """
    if torch.compiler.is_compiling() and x.device.type == "cuda":
        return (x.double() / number).float()
    return x / x.new_full((), number)


def tensor_scale_of(largest: Tensor, spec: QuantSpec) -> Tensor:
    """Compute the per-tensor scale that maps the largest slice scale to e4m3's maximum.

    Like the global scale of compressed-tensors, it is a divisor: a slice is scaled by ``e4m3 / outer_scale``.

    Args:
        largest: Magnitudes, float32, any shape.
        spec: A spec with ``two_level`` scales.

    Returns:
        ``[1]``, float32.
    """
    largest = largest.amax().clamp(min=torch.finfo(torch.float32).tiny).view(1)
    scale = (E4M3_MAX * spec.qmax) / largest
    return torch.where(scale.isfinite(), scale, torch.ones_like(scale))


def _mx_scale(largest: Tensor, spec: QuantSpec) -> Tensor:
    """Compute the power of two that puts the largest value into the top binade.

    OCP MX 1.0, section 6.3. As in compressed-tensors, a value closer to the next power of two than to the largest code
    is rounded up to that power. This starts at 1.75 times a power of two (1.9375 with 6 bits, whose largest code is
    1.875 times one).
    """
    mantissa, exponent = torch.frexp(largest)
    carries = mantissa * 2 >= (1.9375 if spec.num_bits == 6 else 1.75)
    emax = torch.frexp(torch.tensor(spec.qmax, dtype=torch.float32))[1].to(exponent.device)
    return torch.where(largest > 0, torch.exp2((exponent + carries.int() - emax).float().clamp(-127, 127)), 0.0)


def round_scale(scale: Tensor, spec: QuantSpec, outer_scale: Tensor | None = None) -> Tensor:
    """Round a scale to a nonzero value of ``spec.scale_dtype``, returned in float32.

    Scales are negative only with the signed rule; otherwise, only their magnitude is used. The minimum of float16
    scales is 2**-24, the smallest subnormal: with the smallest normal number, weights of 1e-5 would all be rounded to
    zero.
    """
    if spec.super_blocks:
        assert outer_scale is not None
        return multiples(scale, outer_scale[..., 0], SCALE_DTYPES[spec.scale_dtype].levels)
    size = scale.float().abs()
    if spec.scale_dtype == "float8_e8m0fnu":
        # the nearest power of two on a logarithmic axis; the last bit of a logarithm itself depends on the device
        mantissa, exponent = torch.frexp(size.clamp(2.0**-126, 2.0**127))
        power = torch.exp2((exponent - (mantissa <= 0.5**0.5).int()).float())
        size = torch.where(size.isnan(), size, power)  # the exponent of NaN is undefined
    elif spec.late_scales:
        size = size.clamp(torch.finfo(torch.float32).tiny, torch.finfo(torch.float16).max)
    elif spec.scale_dtype == "ue4m3":
        size = size.clamp(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn).float()
    elif spec.two_level:
        assert outer_scale is not None
        # the reciprocal of float32's smallest numbers is infinite, so the quotient e4m3 / outer_scale is kept finite
        small = (size * outer_scale).clamp(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn).float()
        size = small / outer_scale
    else:
        dtype = getattr(torch, spec.scale_dtype)
        smallest = SMALLEST if dtype is torch.float16 else torch.finfo(dtype).tiny
        size = size.clamp(smallest, torch.finfo(dtype).max)
        if spec.scale_rule == "minimum":
            size = _short(size, spec.num_bits)
        if dtype is not torch.float32:
            size = size.to(dtype).float()
    return torch.where(scale < 0, -size, size) if spec.scale_rule == "signed" else size


def _short(scale: Tensor, num_bits: int) -> Tensor:
    """Round to so few significant bits that the product with any zero point is a finite float16 number."""
    mantissa, exponent = torch.frexp(scale.clamp(max=2.0 ** (16 - num_bits)))
    steps = 2.0 ** (11 - num_bits)  # float16 has 11 significant bits, of which the zero point takes `num_bits`
    return (mantissa * steps).round() / steps * torch.exp2(exponent.float())


def multiples(x: Tensor, steps: Tensor, levels: tuple[int, int]) -> Tensor:
    """Round ``[out, groups]`` to multiples of the steps ``[out, super-blocks]``, by factors within `levels`.

    The product of a float16 number and an integer of at most 8 bits is exact in float32. A factor is 0 only if 0 is the
    smallest level.
    """
    steps = steps.repeat_interleave(x.shape[-1] // steps.shape[-1], dim=-1)
    factors = (x.float() / steps).round().clamp(*levels)
    if levels[0] < 0:
        factors = torch.where(factors == 0, torch.where(x.sign() * steps.sign() < 0, -1.0, 1.0), factors)
    return factors * steps


def round_zero_point(zero_point: Tensor, spec: QuantSpec, outer_scale: Tensor | None = None) -> Tensor:
    """Round a zero point to the nearest integer code, so that zero is represented exactly.

    A minimum is rounded to a multiple of its super-block's step.
    """
    if spec.has_minimum:
        assert outer_scale is not None
        return multiples(zero_point, outer_scale[..., 1], (0, SCALE_DTYPES[spec.scale_dtype].levels[1]))
    return zero_point.round().clamp(spec.qmin, spec.qmax)
