"""How a tensor becomes a scale: from its range, its mean magnitude, or the least squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit.quantization.arithmetic import (
    aligned,
    blocks,
    choose_qparams,
    fake_quantize,
    round_scale,
    tensor_scale_of,
    value_range,
)
from qatkit.spec import QuantSpec


def computed_qparams(x: Tensor, spec: QuantSpec, tensor_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point as ``observer: minmax`` or ``absmean`` compute them from the tensor itself.

    Args:
        x: The tensor, any float dtype.
        spec: Its quantization.
        tensor_scale: For scales of two levels, ``[1]``; by default from `x`.

    Returns:
        Scale and zero point in their stored shape, float32.
    """
    if spec.type == "ternary":
        return absmean_qparams(x, spec)
    return choose_qparams(*value_range(x, spec), spec, tensor_scale)


def absmean_qparams(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The mean magnitude of every slice, the scale of ternary weights in BitNet b1.58.

    Ma et al., 2024, https://arxiv.org/abs/2402.17764, equations 1 to 3.
    """
    grid = blocks(x.detach().float().abs(), spec)
    shape = value_range(x, spec)[0].shape
    slices = aligned(torch.empty(shape, device="meta"), x, spec).shape
    total = grid.sum_to_size(slices).view(shape)
    if spec.strategy == "block":  # blocks at the edges may hold fewer values
        count = blocks(torch.ones_like(x, dtype=torch.float32), spec).sum_to_size(slices).view(shape)
    else:
        count = torch.full_like(total, x.numel() / shape.numel())
    scale = total / count
    scale = torch.where(scale > 0, scale, torch.where(scale.amax() > 0, scale.amax(), torch.ones_like(scale)))
    return round_scale(scale, spec), torch.zeros_like(scale)


def mse_qparams(
    x: Tensor, spec: QuantSpec, steps: int = 100, smallest: float | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point with the least squared error among ranges shrunk in equal steps.

    Args:
        x: The tensor, any float dtype.
        spec: Its quantization.
        steps: How many ranges are tried, from the full one down.
        smallest: The narrowest range tried, as a share of the full one; by default a tenth, and a hundredth for
            ternary codes, which one outlier in a slice would turn into zeros.
        weights: How often each value counts, in the shape of `x`; once by default.

    Returns:
        Scale and zero point in their stored shape, float32.
    """
    if smallest is None:
        smallest = 0.01 if spec.type == "ternary" else 0.1
    x = x.detach().float()
    low, high = value_range(x, spec)
    tensor_scale = tensor_scale_of(torch.maximum(-low, high), spec) if spec.two_level else None
    best_scale, best_zero_point = choose_qparams(low, high, spec, tensor_scale)
    best = _squared_error(x, best_scale, best_zero_point, spec, weights)
    for share in torch.linspace(1.0, smallest, steps)[1:].tolist():
        scale, zero_point = choose_qparams(low * share, high * share, spec, tensor_scale)
        error = _squared_error(x, scale, zero_point, spec, weights)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
    return best_scale, best_zero_point


def _squared_error(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, weights: Tensor | None) -> Tensor:
    error = (fake_quantize(x, scale, zero_point, spec) - x).square()
    error = blocks(error if weights is None else error * weights, spec)
    return error.sum_to_size(aligned(scale, x, spec).shape).view(scale.shape)
