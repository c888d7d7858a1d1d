"""The integer arithmetic: one set of functions that training, export and verification all call.

Everything is computed in float32 whatever the tensor's dtype, as ``codes = round(clip(x / scale)) + zero_point``: clip
first, then round half to even, which is ONNX's QuantizeLinear and the order of the LSQ paper. Division, not
multiplication by a reciprocal: the two differ in the last bit, and the runtimes divide.

Scales are stored in the shapes of compressed-tensors: ``[1]`` per tensor, ``[out, 1]`` per channel,
``[out, groups]`` per group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qatkit.spec import QuantSpec


def blocks(x: Tensor, spec: QuantSpec) -> Tensor:
    """View `x` so that one scale belongs to one slice.

    Args:
        x: A weight ``[out, ...]``, or an activation of any shape.
        spec: Its quantization.

    Returns:
        ``x`` itself, or ``[out, groups, group_size]`` with strategy "group".
    """
    if spec.group_size is None:
        return x
    return x.view(*x.shape[:-1], x.shape[-1] // spec.group_size, spec.group_size)


def aligned(scale: Tensor, x: Tensor, spec: QuantSpec) -> Tensor:
    """Reshape a stored scale (or zero point) so that it broadcasts over ``blocks(x, spec)``."""
    if spec.strategy == "channel":
        return scale.view(-1, *[1] * (x.dim() - 1))
    return scale.unsqueeze(-1) if spec.strategy == "group" else scale


def value_range(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every slice that shares a scale, in float32 and the stored scale's shape."""
    x = x.detach()
    if spec.strategy == "tensor":
        low, high = torch.aminmax(x)
        return low.float().view(1), high.float().view(1)
    if spec.strategy == "channel":
        low, high = torch.aminmax(x.flatten(1), dim=1, keepdim=True)
    elif spec.strategy == "group":
        low, high = torch.aminmax(blocks(x, spec), dim=-1)
    else:  # a token is the last dimension
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
    return low.float(), high.float()


def choose_qparams(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of slices whose values lie in ``[low, high]``.

    A slice that is all zero gets the scale of the widest slice (1 if there is none), never 0 or NaN.

    Args:
        low: Smallest values, float32, any shape.
        high: Largest values, the same shape.
        spec: Bits, symmetry and the dtype that scales are rounded to.

    Returns:
        Scale and zero point (whole numbers), both float32 in the shape of `low`.

    Example:
        >>> import torch
        >>> spec = QuantSpec(num_bits=8, symmetric=False, strategy="tensor")
        >>> scale, zero_point = choose_qparams(torch.tensor([-0.3]), torch.tensor([1.2]), spec)
        >>> zero_point.item()
        51.0
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.maximum(-low, high) / spec.qmax if spec.symmetric else (high - low) / spec.qmax
    widest = scale.amax() if scale.numel() else scale.new_ones(())
    scale = torch.where(scale > 0, scale, torch.where(widest > 0, widest, torch.ones_like(widest)))
    scale = round_scale(scale, spec)
    if spec.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, (spec.qmin - low / scale).round().clamp(spec.qmin, spec.qmax)


def round_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Make a scale positive and a number of ``spec.scale_dtype``; returned in float32.

    The smallest is 2**-24 for float16, its smallest subnormal: weights of 1e-5 would lose everything above it.
    """
    dtype = getattr(torch, spec.scale_dtype)
    smallest = 2.0**-24 if dtype is torch.float16 else torch.finfo(dtype).tiny
    scale = scale.float().abs().clamp(smallest, torch.finfo(dtype).max)
    return scale if dtype is torch.float32 else scale.to(dtype).float()


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of `x`, as int8 (symmetric) or uint8 (asymmetric), in the shape of `x`.

    Example:
        >>> import torch
        >>> spec = QuantSpec(8, symmetric=False, strategy="tensor")
        >>> x = torch.tensor([0.5, 1.2, -0.3, 0.8])
        >>> quantize(x, *choose_qparams(*value_range(x, spec), spec), spec).tolist()
        [136, 255, 0, 187]
    """
    grid = blocks(x.detach(), spec)
    scale, zero_point = aligned(scale, x, spec), aligned(zero_point, x, spec)
    codes = _round_clipped(grid.float() / scale, zero_point, spec) + zero_point
    return codes.to(torch.int8 if spec.symmetric else torch.uint8).view(x.shape)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """The values that codes stand for, ``(codes - zero_point) * scale``, in float32."""
    scale, zero_point = aligned(scale, codes, spec), aligned(zero_point, codes, spec)
    return ((blocks(codes, spec).float() - zero_point) * scale).view(codes.shape)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    gradient_scale: float = 1.0,
    clips: bool = True,
) -> Tensor:
    """``dequantize(quantize(x))`` in the dtype of `x`, with straight-through gradients.

    Where `x` lies inside the range its gradient passes unchanged, outside it is zero. The scale's gradient is
    equation 3 of LSQ (Esser et al., 2020, https://arxiv.org/abs/1902.08153): ``round(v) - v`` inside and the
    clipped code outside,
    with ``v = x / scale``, summed over the slice.

    Args:
        x: Any float tensor.
        scale: In its stored shape, float32.
        zero_point: Whole numbers in float32, the shape of `scale`.
        spec: Bits, symmetry and strategy.
        gradient_scale: Multiplies the scale's gradient; LSQ takes ``1 / sqrt(slice size * qmax)``.
        clips: False promises that the scale was computed from `x` itself, so that nothing lies outside the range: the
            gradient is then the identity and nothing is kept for the backward pass.
    """
    grid = blocks(x, spec)
    scale, zero_point = aligned(scale, x, spec), aligned(zero_point, x, spec)
    out: Tensor  # Function.apply is untyped in torch
    if clips:
        out = _FakeQuantize.apply(grid, scale, zero_point, spec, gradient_scale)  # type: ignore[no-untyped-call]
    else:
        out = _FakeQuantizeWithin.apply(grid, scale, zero_point, spec)  # type: ignore[no-untyped-call]
    return out.view(x.shape)


def _round_clipped(v: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Round ``v = x / scale`` to the grid around zero; the zero point is added after, which keeps ties to even."""
    if spec.symmetric:
        return v.clamp(spec.qmin, spec.qmax).round()
    return torch.minimum(torch.maximum(v, spec.qmin - zero_point), spec.qmax - zero_point).round()


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, gradient_scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.spec, ctx.gradient_scale = spec, gradient_scale
        return (_round_clipped(x.float() / scale, zero_point, spec) * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        spec: QuantSpec = ctx.spec
        v = x.float() / scale
        inside = (v >= spec.qmin - zero_point) & (v <= spec.qmax - zero_point)
        grad_x = torch.where(inside, grad, 0)
        grad_scale = None
        if ctx.needs_input_grad[1]:
            slope = _round_clipped(v, zero_point, spec) - torch.where(inside, v, 0)
            grad_scale = (grad.float() * slope).sum_to_size(scale.shape) * ctx.gradient_scale
        return grad_x, grad_scale, None, None, None


class _FakeQuantizeWithin(torch.autograd.Function):
    """Fake quantization of values that all lie inside the range: the straight-through gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
        return (_round_clipped(x.float() / scale, zero_point, spec) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None
