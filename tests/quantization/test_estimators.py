"""Scales from ranges and from the least squared error."""

from __future__ import annotations

import torch

from qatkit import QuantSpec, fake_quantize
from qatkit.quantization.estimators import computed_qparams, mse_qparams


def error(x: torch.Tensor, qparams: tuple[torch.Tensor, torch.Tensor], spec: QuantSpec) -> torch.Tensor:
    return (fake_quantize(x, *qparams, spec) - x).square().sum(dim=1)


def test_the_mse_search_is_never_worse_than_the_range_and_much_better_with_an_outlier() -> None:
    w = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    w[0, 0] = 12.0
    for bits in (2, 3, 4):
        spec = QuantSpec(bits)
        ranged, searched = error(w, computed_qparams(w, spec), spec), error(w, mse_qparams(w, spec), spec)
        assert (searched <= ranged).all()
        assert searched.sum() < 0.8 * ranged.sum()


def test_the_mse_search_finds_the_best_of_a_fine_brute_force_within_a_percent() -> None:
    w = torch.randn(1, 4096, generator=torch.Generator().manual_seed(1))
    spec = QuantSpec(4, strategy="tensor")
    found = error(w, mse_qparams(w, spec), spec).item()
    shares = torch.linspace(0.05, 1, 2000)
    best = min(error(w, (w.abs().amax().view(1) / 7 * s, torch.zeros(1)), spec).item() for s in shares)
    assert found <= 1.01 * best
