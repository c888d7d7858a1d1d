"""The arithmetic of quantization, shared by training, export and verification.

Everything is computed in float32 regardless of the tensor's dtype, as ``codes = round(clip(x / scale)) + zero_point``.
Values are first clipped and then rounded half to even, in the same order as in the LSQ paper and ONNX's QuantizeLinear.
Values are divided by the scale, as in the runtimes; multiplying by its reciprocal would differ in the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qatkit.quantization.grids import grid_of
from qatkit.quantization.slices import aligned, from_slices, to_slices
from qatkit.spec import QuantSpec


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Compute the codes of `x`, in the shape of `x`.

    Their dtype is int8 (symmetric integers), uint8 (asymmetric integers), float8, or uint8 with the bits of 4-bit and
    6-bit floats.

    Example:
        >>> from qatkit.quantization import choose_qparams, value_range
        >>> spec = QuantSpec(8, symmetric=False, strategy="tensor")
        >>> x = torch.tensor([0.5, 1.2, -0.3, 0.8])
        >>> quantize(x, *choose_qparams(*value_range(x, spec), spec), spec).tolist()
        [136, 255, 0, 187]
    """
    slices = to_slices(x.detach(), spec)
    scale, zero_point = aligned(scale, x, spec), aligned(zero_point, x, spec)
    values = _round_clipped(_unscaled(slices, scale, zero_point, spec), zero_point, spec)
    return from_slices(grid_of(spec).encode(values, _code_of_zero(zero_point, spec)), x.shape, spec)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Compute the values that codes represent, in float32.

    They are ``(codes - zero_point) * scale``, or ``codes * scale - zero_point`` if the spec has a minimum, which takes
    the place of the zero point.
    """
    scale, zero_point = aligned(scale, codes, spec), aligned(zero_point, codes, spec)
    # to_slices pads with zeros, which torch does not do for float8
    slices = to_slices(codes.view(torch.uint8), spec).view(codes.dtype)
    values = grid_of(spec).decode(slices, _code_of_zero(zero_point, spec))
    return from_slices(_scaled(values, scale, zero_point, spec), codes.shape, spec)


def exact_codes(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Compute the codes of `x` before rounding and clipping, as ``to_slices(x)``, float32."""
    scale, zero_point = aligned(scale, x, spec), aligned(zero_point, x, spec)
    return _unscaled(to_slices(x, spec), scale, zero_point, spec) + _code_of_zero(zero_point, spec)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    gradient_scale: float = 1.0,
    clips: bool = True,
) -> Tensor:
    """Compute ``dequantize(quantize(x))`` in the dtype of `x`, with straight-through gradients.

    The gradient of `x` passes unchanged inside the range and is zero outside. The scale's gradient is equation 3 of LSQ
    (Esser et al., 2020, https://arxiv.org/abs/1902.08153): ``round(v) - v`` inside and the clipped code outside, with
    ``v = x / scale``, summed over the slice. The zero point's gradient is ``-scale`` outside and zero inside, so a
    learned offset has the gradient of LSQ+ (Bhalgat et al., 2020, https://arxiv.org/abs/2004.09576, equation 5). The
    gradient of a minimum is -1 outside and zero inside.

    Args:
        x: Any float tensor.
        scale: The scale in its stored shape, float32.
        zero_point: Integers in float32, in the shape of `scale`; minima if the spec has them.
        spec: Element type, number of bits, symmetry and strategy.
        gradient_scale: Factor for the gradients of scale and zero point; LSQ uses ``1 / sqrt(slice size * qmax)``.
        clips: Pass False if the scale is always computed from `x` itself. No value is then clipped, so the gradient is
            the identity and no tensor is saved for the backward pass.
    """
    slices = to_slices(x, spec)
    scale, zero_point = aligned(scale, x, spec), aligned(zero_point, x, spec)
    out: Tensor  # Function.apply is untyped in torch
    if clips:
        out = _FakeQuantize.apply(slices, scale, zero_point, spec, gradient_scale)  # type: ignore[no-untyped-call]
    else:
        out = _FakeQuantizeWithin.apply(slices, scale, zero_point, spec)  # type: ignore[no-untyped-call]
    return from_slices(out, x.shape, spec)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert the result of an autograd function to a dtype.

    In torch 2.11, a `.to` that does not change the dtype silently drops the gradient under torch.compile.
    """
    return x if x.dtype == dtype else x.to(dtype)


def _code_of_zero(zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return the number that is added to values on the grid to get codes: 0 if the spec has minima."""
    return torch.zeros_like(zero_point) if spec.has_minimum else zero_point


def _unscaled(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    return (x.float() + zero_point) / scale if spec.has_minimum else x.float() / scale


def _scaled(values: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    if spec.late_scales:
        scale = scale.half().float()
    return values * scale - zero_point if spec.has_minimum else values * scale


def _round_clipped(v: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Round ``v = x / scale`` to the grid around zero.

    The zero point is added to the result, not before rounding, which keeps ties to even.
    """
    if spec.symmetric or spec.has_minimum:
        return grid_of(spec).round(v.clamp(spec.qmin, spec.qmax))
    return torch.minimum(torch.maximum(v, spec.qmin - zero_point), spec.qmax - zero_point).round()


def _rounded(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    values = _round_clipped(_unscaled(x, scale, zero_point, spec), zero_point, spec)
    return in_dtype(_scaled(values, scale, zero_point, spec), x.dtype)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, gradient_scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.spec, ctx.gradient_scale = spec, gradient_scale
        return _rounded(x, scale, zero_point, spec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        spec: QuantSpec = ctx.spec
        v, code_of_zero = _unscaled(x, scale, zero_point, spec), _code_of_zero(zero_point, spec)
        inside = (v >= spec.qmin - code_of_zero) & (v <= spec.qmax - code_of_zero)
        grad_x = torch.where(inside, grad, 0)
        grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[1]:
            slope = _round_clipped(v, zero_point, spec) - torch.where(inside, v, 0)
            grad_scale = (grad.float() * slope).sum_to_size(scale.shape) * ctx.gradient_scale
        if ctx.needs_input_grad[2]:
            outside = torch.where(inside, 0, grad.float()).sum_to_size(zero_point.shape)
            grad_zero_point = outside * (-1 if spec.has_minimum else -scale) * ctx.gradient_scale
        return grad_x, grad_scale, grad_zero_point, None, None


class _FakeQuantizeWithin(torch.autograd.Function):
    """Fake quantization of values inside the range, where the gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
        return _rounded(x, scale, zero_point, spec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None
