"""SmoothQuant's scales against the equation, and the search for its alpha against every one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qatkit import QuantSpec, fake_quantize
from qatkit.quantization.estimators import computed_qparams
from qatkit.quantization.ptq.hessian import InputStatistics
from qatkit.quantization.ptq.smoothquant import smoothquant_scales, smoothquant_search


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_scales_are_equation_4(alpha: float) -> None:
    activations, weights = [0.5, 3.0, 80.0], [0.2, 1.5, 0.01]
    scales = smoothquant_scales(torch.tensor(activations), torch.tensor(weights), alpha)
    expected = [a**alpha / w ** (1 - alpha) for a, w in zip(activations, weights, strict=True)]
    assert all(math.isclose(s, e, rel_tol=1e-6) for s, e in zip(scales.tolist(), expected, strict=True))


def test_with_one_half_weights_and_activations_end_up_with_the_same_range() -> None:
    activations, weights = torch.rand(16) * 50 + 0.1, torch.rand(16) + 0.01
    scales = smoothquant_scales(activations, weights)
    torch.testing.assert_close(activations / scales, weights * scales)


def test_what_is_always_zero_keeps_its_scale() -> None:
    scales = smoothquant_scales(torch.tensor([0.0, 4.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]))
    assert scales.tolist() == [1.0, 1.0, 1.0]


CHANNEL, TOKEN = QuantSpec(8), QuantSpec(8, strategy="token", scale_rule="range")


def statistics_of(x: Tensor) -> InputStatistics:
    statistics = InputStatistics(second_moment=False)
    statistics.update(x)
    return statistics


def errors_of(x: Tensor, weights: list[Tensor], scales: Tensor, activation: QuantSpec | None) -> float:
    """Summed squared error of the outputs, in float64."""
    total = 0.0
    for weight in weights:
        scaled, inputs = weight * scales, x / scales
        rounded = fake_quantize(scaled, *computed_qparams(scaled, CHANNEL), CHANNEL).double()
        if activation is not None:
            inputs = fake_quantize(inputs, *computed_qparams(inputs, activation), activation)
        total += float((inputs.double() @ rounded.t() - x.double() @ weight.double().t()).square().sum())
    return total


@pytest.mark.parametrize("loud", [1.0, 30.0, 1000.0])
def test_the_search_is_at_least_as_good_as_every_alpha_of_its_grid_and_as_no_scales(loud: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(128, 32)
    x[:, :2] *= loud
    weights = [torch.randn(8, 32) * torch.rand(32), torch.randn(16, 32)]
    ranges = x.abs().amax(0), torch.cat(weights).abs().amax(0)
    scales = smoothquant_search(weights, [CHANNEL] * 2, [TOKEN] * 2, statistics_of(x), ranges[1])
    found = errors_of(x, weights, scales, TOKEN)
    half = (x.amax(0) - x.amin(0)) / 2
    sizes = ranges[0], half, x.abs().mean(0)
    grid = [
        errors_of(x, weights, smoothquant_scales(size, ranges[1], alpha / 10), TOKEN)
        for size in sizes
        for alpha in range(11)
    ]
    assert found <= min(*grid, errors_of(x, weights, torch.ones(32), TOKEN)) * (1 + 1e-5)


def test_without_rounded_inputs_nothing_moves_into_the_weights_that_harms_them() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(64, 32) * torch.logspace(-2, 2, 32), [torch.randn(8, 32)]
    ranges = x.abs().amax(0), weights[0].abs().amax(0)
    scales = smoothquant_search(weights, [CHANNEL], [None], statistics_of(x), ranges[1])
    fixed = smoothquant_scales(*ranges)
    assert errors_of(x, weights, scales, None) <= errors_of(x, weights, fixed, None)
    assert torch.equal(smoothquant_search(weights, [None], [None], statistics_of(x), ranges[1]), torch.ones(32))


def test_few_rows_are_all_kept_and_many_at_equal_distances() -> None:
    statistics = InputStatistics(second_moment=False)
    for part in torch.arange(200.0).view(-1, 1).split(37):
        statistics.update(part)
    assert statistics.sample.flatten().tolist() == list(range(200))
    for part in torch.arange(200.0, 5000.0).view(-1, 1).split(37):
        statistics.update(part)
    kept = statistics.sample.flatten()
    assert 256 <= len(kept) < 512
    assert kept.diff().unique().tolist() == [16.0]
    statistics.rescale(torch.tensor([2.0]))
    assert torch.equal(statistics.sample.flatten(), kept / 2)
