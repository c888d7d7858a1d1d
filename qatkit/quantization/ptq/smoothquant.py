"""SmoothQuant: move what makes activations hard to quantize into the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qatkit.quantization.arithmetic import fake_quantize
from qatkit.quantization.observers import computed_qparams
from qatkit.quantization.ptq.hessian import InputStatistics
from qatkit.spec import QuantSpec


def smoothquant_scales(activation_absmax: Tensor, weight_absmax: Tensor, alpha: float = 0.5) -> Tensor:
    """What inputs are divided by, and the weight's columns multiplied with.

    Xiao et al., 2022, https://arxiv.org/abs/2211.10438, equation 4: ``max|X|^alpha / max|W|^(1 - alpha)``. An input
    that is always zero, or a column that is, keeps scale 1.

    Args:
        activation_absmax: Largest magnitude of every input, ``[in]``.
        weight_absmax: Largest magnitude of every input's weights, over all layers that read it, ``[in]``.
        alpha: How much of the difficulty moves: 0 evens out the weights, 1 the activations.

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
    """The scales of equation 4 whose alpha changes the outputs least, with weights and inputs both rounded.

    Xiao et al. choose one alpha per model from a grid (section 5.1). Which is best differs from input to input: here
    each gets its own, and no scales where none helps. Each alpha is also tried with half of every input's range in
    place of its largest magnitude, as later code has it, and with its mean magnitude.

    Args:
        weights: The layers that read the input, each ``[out, in]``.
        weight_specs: How each weight is quantized; None if it is not.
        input_specs: How each layer's input is quantized; None if it is not.
        statistics: Of the inputs, with rows kept: the errors are those of the outputs of these rows.
        weight_absmax: Largest magnitude of every input's weights, over all layers that read it, ``[in]``.
        grid: Into how many steps alpha from 0 to 1 is divided; then also between the best ones.

    Returns:
        float32 ``[in]``, all positive; ones where no scaling is better.

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
            made = _rounded(scaled, input_spec) @ _rounded(weight * scales, weight_spec).t()
            total += float((made - outputs).square().sum())
        return total

    best = torch.ones_like(weight_absmax, dtype=torch.float32)
    least, size, around = error(best), statistics.absmax, 0.5

    def attempt(activation: Tensor, alpha: float) -> None:
        nonlocal best, least, size, around
        scales = smoothquant_scales(activation, weight_absmax, alpha)
        found = error(scales)
        if found < least:
            best, least, size, around = scales, found, activation, alpha

    for activation in (statistics.absmax, statistics.half_range, statistics.magnitude):
        for alpha in torch.linspace(0, 1, grid + 1).tolist():
            attempt(activation, alpha)
    for step in (-0.5, -0.25, 0.25, 0.5):
        attempt(size, min(max(around + step / grid, 0.0), 1.0))
    return best


def _rounded(x: Tensor, spec: QuantSpec | None) -> Tensor:
    return x if spec is None else fake_quantize(x, *computed_qparams(x, spec), spec)
