"""The arithmetic of quantization, shared by training, export and verification.

Everything is computed in float32 regardless of the tensor's dtype, as ``codes = round(clip(x / scale)) + zero_point``.
Values are first clipped and then rounded half to even, in the same order as in the LSQ paper and ONNX's QuantizeLinear.
Values are divided by the scale, as in the runtimes; multiplying by its reciprocal would differ in the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    return from_slices(_codes(_on_grid(slices, scale, zero_point, spec), zero_point, spec), x.shape, spec)


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


def coded(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, clips: bool = True) -> tuple[Tensor, Tensor]:
    """Compute `fake_quantize` of `x` with a fixed scale, and the codes, which are all that a later product must keep.

    For the backward pass, only a mask of values inside the range is kept, and nothing if `clips` is False.

    Args:
        x: Any float tensor.
        scale: The scale in its stored shape, float32; its gradient is not computed.
        zero_point: As in `fake_quantize`.
        spec: Element type, number of bits, symmetry and strategy; without minima.
        clips: As in `fake_quantize`.

    Returns:
        The values, in the dtype of `x`, and the codes, as from `quantize`.
    """
    slices = to_slices(x, spec)
    scale, zero_point = aligned(scale, x, spec), aligned(zero_point, x, spec)
    values, codes = _Coded.apply(slices, scale, zero_point, spec, clips)  # type: ignore[no-untyped-call]
    return from_slices(values, x.shape, spec), from_slices(codes, x.shape, spec)


@torch.no_grad()
def fake_quantized(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Compute `fake_quantize` without gradients."""
    slices = to_slices(x, spec)
    return from_slices(_rounded(slices, aligned(scale, x, spec), aligned(zero_point, x, spec), spec), x.shape, spec)


@torch.no_grad()
def fake_quantize_gradients(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, grad: Tensor, gradient_scale: float,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Compute the gradients of `fake_quantize` with respect to `x`, `scale` and `zero_point`.

    Args:
        x: The tensor that was quantized.
        scale: The scale in its stored shape, float32.
        zero_point: As in `fake_quantize`.
        spec: Element type, number of bits, symmetry and strategy.
        grad: The gradient of the result, in the shape of `x`.
        gradient_scale: As in `fake_quantize`.
        needed: Whether the gradients of scale and zero point are computed; otherwise they are None.
    """
    slices, aligned_scale, aligned_zero = to_slices(x, spec), aligned(scale, x, spec), aligned(zero_point, x, spec)
    grad_x, *others = _gradients(
        slices, aligned_scale, aligned_zero, spec, to_slices(grad, spec), gradient_scale, needed
    )
    grad_scale, grad_zero_point = (None if other is None else other.view(scale.shape) for other in others)
    return from_slices(grad_x, x.shape, spec), grad_scale, grad_zero_point


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
    """Round ``v = x / scale`` to the grid around zero; `v` is overwritten.

    The zero point is added to the result, not before rounding, which keeps ties to even.
    """
    if spec.symmetric or spec.has_minimum:
        return grid_of(spec).round(v.clamp_(spec.qmin, spec.qmax))
    return v.clamp_(spec.qmin - zero_point, spec.qmax - zero_point).round_()


def _on_grid(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Round slices to the grid; the values are those of `decode`, before scaling."""
    return _round_clipped(_unscaled(x, scale, zero_point, spec), zero_point, spec)


def _codes(values: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    return grid_of(spec).encode(values, _code_of_zero(zero_point, spec))


def _rounded(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    return in_dtype(_scaled(_on_grid(x, scale, zero_point, spec), scale, zero_point, spec), x.dtype)


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
        gradients = _gradients(x, scale, zero_point, ctx.spec, grad, ctx.gradient_scale, ctx.needs_input_grad[1:3])
        return *gradients, None, None


def _gradients(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, grad: Tensor, gradient_scale: float,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of slices, scale and zero point; those of scale and zero point only if they are needed."""
    v, code_of_zero = _unscaled(x, scale, zero_point, spec), _code_of_zero(zero_point, spec)
    inside = (v >= spec.qmin - code_of_zero) & (v <= spec.qmax - code_of_zero)
    grad_scale = grad_zero_point = None
    if needed[0]:
        exact = torch.where(inside, v, 0)
        slope = _round_clipped(v, zero_point, spec) - exact
        grad_scale = (grad.float() * slope).sum_to_size(scale.shape) * gradient_scale
    if needed[1]:
        outside = torch.where(inside, 0, grad.float()).sum_to_size(zero_point.shape)
        grad_zero_point = outside * (-1 if spec.has_minimum else -scale) * gradient_scale
    return torch.where(inside, grad, 0), grad_scale, grad_zero_point


class _Coded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, clips: bool
    ) -> tuple[Tensor, Tensor]:
        v, inside = _unscaled(x, scale, zero_point, spec), None
        if clips and ctx.needs_input_grad[0]:
            code_of_zero = _code_of_zero(zero_point, spec)
            inside = (v >= spec.qmin - code_of_zero) & (v <= spec.qmax - code_of_zero)
        ctx.save_for_backward(inside)
        values = _round_clipped(v, zero_point, spec)
        codes = _codes(values, zero_point, spec)
        ctx.mark_non_differentiable(codes)
        return in_dtype(_scaled(values, scale, zero_point, spec), x.dtype), codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grad if inside is None else torch.where(inside, grad, 0), None, None, None, None


class _FakeQuantizeWithin(torch.autograd.Function):
    """Fake quantization of values inside the range, where the gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
        return _rounded(x, scale, zero_point, spec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None
