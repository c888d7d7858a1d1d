"""The product of a fake-quantized weight and input, which keeps codes and parameters for the backward pass.

`F.linear` keeps its input and its weight. After fake quantization both are new tensors: the input has the values of
8-bit codes, and the weight is computed from a parameter that is in memory anyway. This product keeps the codes with
their scales, and computes the fake-quantized weight again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qatkit.quantization.arithmetic import dequantize, fake_quantize_gradients, fake_quantized, in_dtype
from qatkit.spec import QuantSpec


@dataclass(frozen=True)
class Codes:
    """The codes of a fake-quantized input, with which its values are computed again."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    spec: QuantSpec


@dataclass(frozen=True)
class WeightGrid:
    """How a weight is fake-quantized; the arguments of `fake_quantize` after the weight."""

    scale: Tensor
    zero_point: Tensor
    spec: QuantSpec
    gradient_scale: float
    clips: bool


def quantized_linear(
    x: Tensor, codes: Codes | None, weight: Tensor, grid: WeightGrid | None, bias: Tensor | None
) -> Tensor:
    """Compute ``F.linear(x, fake_quantize(weight), bias)``, with the same values and gradients.

    Args:
        x: The input ``[..., in]``, fake-quantized if it is quantized.
        codes: The codes of `x`, which are kept instead of it; None keeps `x`.
        weight: The latent weight ``[out, in]``.
        grid: The quantization of the weight; None uses the weight itself.
        bias: ``[out]``, or None.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    output: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
        x, weight, bias,
        *((grid.scale, grid.zero_point) if grid else (None, None)),
        *((codes.codes, codes.scale, codes.zero_point) if codes else (None, None, None)),
        codes and codes.spec, grid and (grid.spec, grid.gradient_scale, grid.clips),
    )  # fmt: skip
    return output


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, zero_point: Tensor | None,
        codes: Tensor | None, input_scale: Tensor | None, input_zero_point: Tensor | None,
        input_spec: QuantSpec | None, grid: tuple[QuantSpec, float, bool] | None,
    ) -> Tensor:  # fmt: skip
        kept = (codes, input_scale, input_zero_point) if codes is not None else (x, None, None)
        for_x, for_weight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:2] + ctx.needs_input_grad[3:5])
        # the weight's gradient needs the input, and the weight itself if values are clipped
        inputs = kept if for_weight else (None, None, None)
        weights = (weight, scale, zero_point) if for_x or (for_weight and grid and grid[2]) else (None, None, None)
        ctx.save_for_backward(*inputs, *weights)
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        ctx.input_spec, ctx.input_dtype, ctx.grid = input_spec, x.dtype, grid
        ctx.bias_dtype = None if bias is None else bias.dtype
        output = F.linear(x.reshape(-1, x.shape[-1]), _weight(weight, scale, zero_point, grid), bias)
        # not a view, which later operations could not change in place
        return torch.ops.aten._unsafe_view(output, [*x.shape[:-1], len(weight)]) if x.dim() != 2 else output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, input_scale, input_zero_point, weight, scale, zero_point = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = grad_scale = grad_zero_point = None
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = in_dtype(flat @ _weight(weight, scale, zero_point, ctx.grid).to(grad.dtype), ctx.input_dtype)
            grad_x = grad_x.view(*grad.shape[:-1], ctx.weight_shape[1])
        if any(ctx.needs_input_grad[1:2] + ctx.needs_input_grad[3:5]):
            spec = ctx.input_spec
            x = kept if spec is None else dequantize(kept, input_scale, input_zero_point, spec)
            grad_weight = in_dtype(flat.t() @ x.reshape(-1, x.shape[-1]).to(grad.dtype), ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = in_dtype(flat.sum(0), ctx.bias_dtype)
        if grad_weight is not None and ctx.grid is not None and ctx.grid[2]:
            spec, gradient_scale, _ = ctx.grid
            grad_weight, grad_scale, grad_zero_point = fake_quantize_gradients(
                weight, scale, zero_point, spec, grad_weight, gradient_scale, ctx.needs_input_grad[3:5]
            )
        return grad_x, grad_weight, grad_bias, grad_scale, grad_zero_point, None, None, None, None, None


def _weight(
    weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, grid: tuple[QuantSpec, float, bool] | None
) -> Tensor:
    if grid is None:
        return weight
    assert scale is not None
    assert zero_point is not None
    return fake_quantized(weight, scale, zero_point, grid[0])
