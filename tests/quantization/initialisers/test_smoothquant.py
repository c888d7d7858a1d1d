"""SmoothQuant's scales against the equation."""

from __future__ import annotations

import math

import pytest
import torch

from qatkit.quantization.initialisers.smoothquant import smoothquant_scales


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
