"""SmoothQuant: move activation outliers into the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qatkit.quantization.arithmetic import fake_quantize
from qatkit.quantization.estimators import computed_qparams
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.ptq.equivalence import SharedInput
from qatkit.quantization.ptq.hessian import InputStatistics
from qatkit.spec import QuantSpec


def smoothquant_scales(activation_absmax: Tensor, weight_absmax: Tensor, alpha: float = 0.5) -> Tensor:
    """Compute the scales that divide inputs and multiply weight columns.

    This is equation 4 of Xiao et al. (2022, https://arxiv.org/abs/2211.10438): ``max|X|^alpha / max|W|^(1 - alpha)``.
    The scale is 1 for an input that is always zero and for a column of zeros.

    Args:
        activation_absmax: Largest magnitude of every input, ``[in]``.
        weight_absmax: Largest magnitude of every input's weights, over all layers that read it, ``[in]``.
        alpha: Migration strength: 0 equalizes the weights, 1 equalizes the activations.

    Returns:
        float32 ``[in]``, all positive.

    Example:
        >>> smoothquant_scales(torch.tensor([8.0, 2.0, 0.0]), torch.tensor([0.5, 0.5, 0.5])).tolist()
        [4.0, 2.0, 1.0]
    """
    activation_absmax, weight_absmax = activation_absmax.float(), weight_absmax.float()
    scales = activation_absmax.pow(alpha) / weight_absmax.pow(1 - alpha)
    alive = (activation_absmax > 0) & (weight_absmax > 0)
    return torch.where(alive, scales, 1.0)


@torch.no_grad()
def smoothquant_search(
    weights: Sequence[Tensor],
    weight_specs: Sequence[QuantSpec | None],
    input_specs: Sequence[QuantSpec | None],
    statistics: InputStatistics,
    weight_absmax: Tensor,
    grid: int = 10,
) -> Tensor:
    """Find the scales of equation 4 that minimize the output error.

    The error includes the quantization errors of both weights and inputs. Xiao et al. choose one alpha per model from a
    grid (section 5.1). The best alpha differs between inputs, so this search chooses one per input, and leaves an input
    unscaled if no alpha reduces the error. Each alpha is also tried with half of every input's range instead of its
    largest magnitude, as in later implementations, and with its mean magnitude.

    Args:
        weights: The layers that read the input, each ``[out, in]``.
        weight_specs: Quantization of each weight; None if it is not quantized.
        input_specs: Quantization of each layer's input; None if it is not quantized.
        statistics: Statistics of the inputs, with a sample of rows on which output errors are computed.
        weight_absmax: Largest magnitude of every input's weights, over all layers that read it, ``[in]``.
        grid: Number of equal steps in the search for alpha from 0 to 1; values around the best one are also tried.

    Returns:
        The scales, float32 ``[in]``, all positive; ones if no scaling reduces the error.

    Example:
        >>> x, weight = torch.randn(64, 16) * torch.logspace(-1, 1, 16), torch.randn(4, 16)
        >>> statistics = InputStatistics(second_moment=False)
        >>> statistics.update(x)
        >>> specs = [QuantSpec(8)], [QuantSpec(8, strategy="token")]
        >>> bool((smoothquant_search([weight], *specs, statistics, weight.abs().amax(0)) > 0).all())
        True
    """
    weights, rows = [weight.detach().float() for weight in weights], statistics.sample
    exact = [rows @ weight.t() for weight in weights]

    def error(scales: Tensor) -> float:
        total, scaled = 0.0, rows / scales
        for weight, weight_spec, input_spec, outputs in zip(weights, weight_specs, input_specs, exact, strict=True):
            actual = _fake_quantized(scaled, input_spec) @ _fake_quantized(weight * scales, weight_spec).t()
            total += float((actual - outputs).square().sum())
        return total

    best = torch.ones_like(weight_absmax, dtype=torch.float32)
    least, size, around = error(best), statistics.absmax, 0.5

    def attempt(activation: Tensor, alpha: float) -> None:
        nonlocal best, least, size, around
        scales = smoothquant_scales(activation, weight_absmax, alpha)
        current = error(scales)
        if current < least:
            best, least, size, around = scales, current, activation, alpha

    for activation in (statistics.absmax, statistics.half_range, statistics.magnitude):
        for alpha in torch.linspace(0, 1, grid + 1, dtype=torch.float32).tolist():
            attempt(activation, alpha)
    for step in (-0.5, -0.25, 0.25, 0.5):
        attempt(size, min(max(around + step / grid, 0.0), 1.0))
    return best


def _fake_quantized(x: Tensor, spec: QuantSpec | None) -> Tensor:
    return x if spec is None else fake_quantize(x, *computed_qparams(x, spec), spec)


def smoothquant_fold(shared: SharedInput) -> Tensor:
    """Compute the scales of one input with `smoothquant_search`."""
    return smoothquant_search(
        [reader.matrix for reader in shared.readers],
        [_spec(reader.weight_fake_quant) for reader in shared.readers],
        [_spec(reader.input_fake_quant) for reader in shared.readers],
        shared.statistics,
        torch.stack([matrix.abs().amax(0) for matrix in shared.matrices]).amax(0),
    )


def _spec(fake_quant: FakeQuantize | None) -> QuantSpec | None:
    return None if fake_quant is None else fake_quant.spec
