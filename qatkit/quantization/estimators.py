"""Estimators of a tensor's scale and zero point from its range, mean magnitude or squared error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qatkit.common.tables import implementation
from qatkit.quantization.arithmetic import fake_quantize
from qatkit.quantization.observers import OBSERVERS
from qatkit.quantization.scales import choose_qparams, round_scale, tensor_scale_of
from qatkit.quantization.slices import aligned, to_slices, value_range
from qatkit.quantization.super_blocks import range_qparams, search_qparams
from qatkit.spec import QuantSpec

QParams = tuple[Tensor, Tensor]

_ESTIMATORS: dict[str, Callable[[Tensor, QuantSpec, Tensor | None], QParams]] = {}


def computed_qparams(x: Tensor, spec: QuantSpec, outer_scale: Tensor | None = None) -> QParams:
    """Compute scale and zero point directly from a tensor.

    The scale is computed from the range or, for ternary codes, from the mean magnitude.

    Args:
        x: The tensor, any float dtype.
        spec: Its quantization.
        outer_scale: For two-level scales, ``[1]``; computed from `x` by default.

    Returns:
        Scale and zero point in their stored shape, float32.

    Example:
        >>> scale, _ = computed_qparams(torch.tensor([[-127.0, 3.0], [0.5, 63.5]]), QuantSpec(num_bits=8))
        >>> scale.tolist()
        [[1.0], [0.5]]
    """
    name = spec.element.computed_by
    if name not in _ESTIMATORS:  # torch.compile cannot follow an import: `FakeQuantize` loads it before it is traced
        load_estimator(spec)
    return _ESTIMATORS[name](x, spec, outer_scale)


def load_estimator(spec: QuantSpec) -> None:
    """Import the function that computes scales of this element type, for `computed_qparams`."""
    name = spec.element.computed_by
    _ESTIMATORS[name] = implementation(OBSERVERS[name].from_tensor)


def minmax_qparams(x: Tensor, spec: QuantSpec, outer_scale: Tensor | None = None) -> QParams:
    """Compute the scale that maps the range of every slice to the range of codes."""
    if spec.super_blocks:
        return range_qparams(x, spec)
    return choose_qparams(*value_range(x, spec), spec, outer_scale)


def absmean_qparams(x: Tensor, spec: QuantSpec, outer_scale: Tensor | None = None) -> QParams:
    """Use the mean magnitude of every slice as its scale, as in BitNet b1.58.

    See Ma et al. (2024, https://arxiv.org/abs/2402.17764), equations 1 to 3.
    """
    slices = to_slices(x.detach().float().abs(), spec)
    shape = value_range(x, spec)[0].shape
    summed = aligned(torch.empty(shape, device="meta"), x, spec).shape
    total = slices.sum_to_size(summed).view(shape)
    if spec.strategy == "block":  # blocks at the edges may hold fewer values
        count = to_slices(torch.ones_like(x, dtype=torch.float32), spec).sum_to_size(summed).view(shape)
    else:
        count = torch.full_like(total, x.numel() / shape.numel())
    scale = total / count
    scale = torch.where(scale > 0, scale, torch.where(scale.amax() > 0, scale.amax(), torch.ones_like(scale)))
    return round_scale(scale, spec), torch.zeros_like(scale)


def unit_qparams(x: Tensor, spec: QuantSpec, outer_scale: Tensor | None = None) -> QParams:
    """Return the scale 1, for types without a scale."""
    scale = torch.ones(1, device=x.device)
    return scale, torch.zeros_like(scale)


def mse_qparams(
    x: Tensor, spec: QuantSpec, steps: int = 100, smallest: float | None = None, weights: Tensor | None = None
) -> QParams:
    """Find the scale and zero point that minimize the squared error over shrunk ranges.

    Ranges shrink in equal steps, starting from the full range. Super-blocks have a search of their own.

    Args:
        x: The tensor, any float dtype.
        spec: Its quantization.
        steps: Number of ranges to try.
        smallest: The narrowest range to try, as a fraction of the full range. The default is the element type's
            `narrowest`.
        weights: Weight of each value's error, in the shape of `x`. The default is 1 for all values.

    Returns:
        Scale and zero point in their stored shape, float32.
    """
    if spec.super_blocks:
        return search_qparams(x, spec, weights)
    if smallest is None:
        smallest = spec.element.narrowest
    x = x.detach().float()
    low, high = value_range(x, spec)
    outer_scale = tensor_scale_of(torch.maximum(-low, high), spec) if spec.two_level else None
    best_scale, best_zero_point = choose_qparams(low, high, spec, outer_scale)
    best = _squared_error(x, best_scale, best_zero_point, spec, weights)
    for fraction in torch.linspace(1.0, smallest, steps, dtype=torch.float32)[1:].tolist():
        scale, zero_point = choose_qparams(low * fraction, high * fraction, spec, outer_scale)
        error = _squared_error(x, scale, zero_point, spec, weights)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
    return best_scale, best_zero_point


def _squared_error(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, weights: Tensor | None) -> Tensor:
    error = (fake_quantize(x, scale, zero_point, spec) - x).square()
    error = to_slices(error if weights is None else error * weights, spec)
    return error.sum_to_size(aligned(scale, x, spec).shape).view(scale.shape)
