"""AWQ: scale up the weights of salient inputs so that they lose less precision, then clip ranges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qatkit.quantization.arithmetic import fake_quantize
from qatkit.quantization.estimators import computed_qparams, mse_qparams
from qatkit.quantization.ptq.equivalence import SharedInput
from qatkit.quantization.ptq.hessian import output_error
from qatkit.quantization.scales import choose_qparams
from qatkit.quantization.slices import value_range
from qatkit.spec import QuantSpec


@torch.no_grad()
def awq_scales(
    weights: Sequence[Tensor], specs: Sequence[QuantSpec], magnitude: Tensor, hessian: Tensor, grid: int = 20
) -> Tensor:
    """Find the input scales that minimize the output error.

    Inputs are divided by the scales, and weight columns are multiplied by them. The search evaluates equations 4 and 5
    of Lin et al. (2023, https://arxiv.org/abs/2306.00978) on a grid of exponents. As in later implementations, each
    exponent is also tried with the weights' mean magnitude in the denominator. The output error of the layers is
    computed exactly from the second moments of their inputs.

    Args:
        weights: The layers that read the input, each ``[out, in]``.
        specs: Quantization of each weight. The search does not clip ranges.
        magnitude: Mean magnitude of every input, ``[in]``.
        hessian: Mean outer product of the input rows, ``[in, in]``.
        grid: Number of equal steps in the search for exponents from 0 to 1.

    Returns:
        The scales, float32 ``[in]``, all positive; ones if no scaling reduces the error.

    Example:
        >>> x = torch.randn(64, 16) * torch.logspace(-1, 1, 16)
        >>> scales = awq_scales([torch.randn(4, 16)], [QuantSpec(num_bits=3)], x.abs().mean(0), x.t() @ x)
        >>> bool((scales > 0).all())
        True
    """
    weights = [weight.detach().float() for weight in weights]
    magnitude, size = magnitude.float(), _relative_size(weights, specs)
    best = torch.ones_like(magnitude)
    least, family, around = _error(weights, specs, best, hessian), 0.0, 0.0

    def attempt(divides: float, exponent: float) -> None:
        nonlocal best, least, family, around
        scales = _balanced(magnitude.pow(exponent) / size.pow(divides * (1 - exponent)))
        error = _error(weights, specs, scales, hessian)
        if error < least:
            best, least, family, around = scales, error, divides, exponent

    for exponent in torch.linspace(0, 1, grid + 1, dtype=torch.float32).tolist():
        attempt(0.0, exponent)
        attempt(1.0, exponent)
    for step in (
        -0.75,
        -0.5,
        -0.25,
        0.25,
        0.5,
        0.75,
    ):  # the error is not smooth, so points in between are tried as well
        attempt(family, around + step / grid)
    return best


def _balanced(scales: Tensor) -> Tensor:
    """Normalize scales around 1.

    Zero (from an input that is always zero) and infinite scales (from zero weights) become 1.
    """
    scales = torch.where(scales.isfinite() & (scales > 0), scales, torch.nan)
    middle = (scales.nan_to_num(0).amax() * scales.nan_to_num(torch.inf).amin()).sqrt()
    return (scales / middle).nan_to_num(1.0, 1.0, 1.0).clamp(1e-4, 1e4)


def _relative_size(weights: Sequence[Tensor], specs: Sequence[QuantSpec]) -> Tensor:
    """Compute every input's mean weight, relative to the largest of its slice, ``[in]``."""
    sizes = []
    for weight, spec in zip(weights, specs, strict=True):
        size = spec.group_size or weight.shape[1]
        grouped = weight.abs().view(len(weight), -1, size)
        sizes.append((grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-30)).view(weight.shape))
    return torch.cat(sizes).mean(0)


def _error(weights: Sequence[Tensor], specs: Sequence[QuantSpec], scales: Tensor, hessian: Tensor) -> float:
    total = 0.0
    for weight, spec in zip(weights, specs, strict=True):
        scaled = weight * scales
        rounded = fake_quantize(scaled, *computed_qparams(scaled, spec), spec)
        total += float(output_error(rounded / scales - weight, hessian).sum())
    return total


@torch.no_grad()
def awq_clip(
    weight: Tensor, hessian: Tensor, spec: QuantSpec, steps: int = 25, smallest: float = 0.4
) -> tuple[Tensor, Tensor]:
    """Find the scale and zero point that minimize the output error over shrunk ranges.

    This is the clipping search of Lin et al., 2023: `estimators.mse_qparams` minimizes the error of the weights; this
    search minimizes the output error of each slice, with all other slices unquantized. The scale with the smallest
    squared weight error is also tried, and is always used for block scales and the two-level scales of NVFP4. For
    super-blocks, every squared error is weighted by the mean square of its input.

    Args:
        weight: ``[out, in]``.
        hessian: Mean outer product of the layer's input rows, ``[in, in]``.
        spec: Quantization of the weight.
        steps: Number of ranges to try, starting from the full range.
        smallest: The narrowest range to try, as a fraction of the full range.

    Returns:
        Scale and zero point in their stored shape, float32.

    Example:
        >>> x, weight = torch.randn(64, 16), torch.randn(4, 16)
        >>> scale, _ = awq_clip(weight, x.t() @ x, QuantSpec(num_bits=3, strategy="group", group_size=8))
        >>> scale.shape
        torch.Size([4, 2])
    """
    weight = weight.detach().float()
    if spec.super_blocks:
        return mse_qparams(weight, spec, weights=hessian.diagonal().expand_as(weight))
    best = mse_qparams(weight, spec)
    if spec.strategy == "block" or spec.two_level:
        return best
    least = _slice_error(weight, best, hessian, spec)
    low, high = value_range(weight, spec)
    for fraction in torch.linspace(1.0, smallest, steps, dtype=torch.float32).tolist():
        tried = choose_qparams(low * fraction, high * fraction, spec)
        error = _slice_error(weight, tried, hessian, spec)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1])
    return best


def _slice_error(weight: Tensor, qparams: tuple[Tensor, Tensor], hessian: Tensor, spec: QuantSpec) -> Tensor:
    """Compute the squared output error that each slice causes, in the stored scale's shape."""
    error = fake_quantize(weight, *qparams, spec) - weight
    if spec.group_size is None:
        rows = output_error(error, hessian)
        return rows.sum().view(1) if spec.strategy == "tensor" else rows.unsqueeze(1)
    size = spec.group_size
    own = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, len(hessian), size)])
    return output_error(error.view(len(weight), -1, size).transpose(0, 1), own).t()  # [out, groups]


def clipped_weight(weight: Tensor, hessian: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return the unchanged weight with the scale and zero point of `awq_clip`."""
    return weight, *awq_clip(weight, hessian, spec)


def awq_fold(shared: SharedInput) -> Tensor | None:
    """Compute the scales of one input with `awq_scales`; None if no weight is quantized."""
    quantized = [(r.matrix.detach(), r.weight_fake_quant.spec) for r in shared.readers if r.weight_fake_quant]
    if not quantized:
        return None
    matrices, specs = zip(*quantized, strict=True)
    return awq_scales(matrices, specs, shared.statistics.magnitude, shared.statistics.hessian)
