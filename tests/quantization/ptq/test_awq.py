"""AWQ's scales and clipping against brute force over the outputs themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qatkit import QuantSpec, fake_quantize
from qatkit.quantization.estimators import computed_qparams, mse_qparams
from qatkit.quantization.ptq.awq import awq_clip, awq_scales

W3 = QuantSpec(3, strategy="group", group_size=16)


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and inputs of which a few are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 64, generator=generator)
    x[:, :3] *= 30
    return torch.randn(24, 64, generator=generator), x


def cost(x: Tensor, weight: Tensor, scales: Tensor, spec: QuantSpec) -> float:
    """Squared error of the outputs with the scales in place, in float64."""
    scaled = weight * scales
    rounded = fake_quantize(scaled, *computed_qparams(scaled, spec), spec).double()
    return float(((x / scales).double() @ rounded.t() - x.double() @ weight.double().t()).square().sum())


@pytest.mark.parametrize("spec", [W3, QuantSpec(4), QuantSpec(4, symmetric=False, strategy="tensor")])
def test_no_exponent_of_a_brute_force_over_outputs_is_better(spec: QuantSpec) -> None:
    weight, x = problem()
    magnitude = x.abs().mean(0)
    found = cost(x, weight, awq_scales([weight], [spec], magnitude, x.t() @ x), spec)
    tried = [cost(x, weight, magnitude ** (i / 80), spec) for i in range(81)]  # a common factor changes nothing
    assert found <= min(tried) * (1 + 1e-4)
    assert found < 0.75 * tried[0]  # the plain weight


def test_inputs_with_small_weights_get_a_finer_grid_than_their_size_alone_asks_for() -> None:
    weight, x = problem()
    weight *= torch.logspace(-1, 1, 64)[torch.randperm(64)]
    magnitude = x.abs().mean(0)
    found = cost(x, weight, awq_scales([weight], [W3], magnitude, x.t() @ x), W3)
    assert found < 0.9 * min(cost(x, weight, magnitude ** (i / 80), W3) for i in range(81))


def test_layers_that_share_an_input_share_the_scales_that_are_best_for_all() -> None:
    weight, x = problem()
    both = [weight[:12], 5 * weight[12:].flip(1)]
    specs = [W3, QuantSpec(8)]
    magnitude, hessian = x.abs().mean(0), x.t() @ x
    together = awq_scales(both, specs, magnitude, hessian)

    def total(scales: Tensor) -> float:
        return sum(cost(x, w, scales, s) for w, s in zip(both, specs, strict=True))

    assert total(together) <= min(total(magnitude ** (i / 20)) for i in range(21)) * (1 + 1e-4)
    assert total(together) < total(awq_scales(both[1:], specs[1:], magnitude, hessian))  # good for one, not for both


def test_inputs_that_are_always_zero_and_layers_that_need_no_help_are_left_alone() -> None:
    weight, x = problem()
    x[:, 5] = 0
    scales = awq_scales([weight], [W3], x.abs().mean(0), x.t() @ x)
    assert scales.isfinite().all()
    assert scales[5] == 1
    on_grid = torch.randint(-7, 8, (24, 64)).float()
    on_grid[:, ::16] = 7
    assert torch.equal(awq_scales([on_grid], [QuantSpec(4)], x.abs().mean(0), x.t() @ x), torch.ones(64))


@pytest.mark.parametrize("spec", [W3, QuantSpec(3), QuantSpec(3, strategy="tensor"), QuantSpec(3, symmetric=False)])
def test_clipping_costs_every_slice_less_than_least_squared_error_of_the_weights(spec: QuantSpec) -> None:
    weight, x = problem()
    weight[:, 40] *= 4

    def costs(qparams: tuple[Tensor, Tensor]) -> Tensor:
        error = (fake_quantize(weight, *qparams, spec) - weight).double()
        size = spec.group_size or 64
        parts = [x[:, i : i + size].double() @ error[:, i : i + size].t() for i in range(0, 64, size)]
        by_slice = torch.stack([part.square().sum(0) for part in parts], 1)
        return by_slice.sum().view(1) if spec.strategy == "tensor" else by_slice

    clipped, mse, full = (
        costs(q) for q in (awq_clip(weight, x.t() @ x, spec), mse_qparams(weight, spec), computed_qparams(weight, spec))
    )
    assert (clipped <= torch.minimum(mse, full) * (1 + 1e-4)).all()
    assert clipped.sum() <= mse.sum() * (1 if spec.strategy == "tensor" else 0.95)


def test_blocks_and_scales_of_two_levels_keep_the_scale_of_least_squared_error() -> None:
    weight, x = problem()
    for spec in (
        QuantSpec(8, type="float", strategy="block", block_structure=(8, 24)),
        QuantSpec(4, type="float", strategy="group", group_size=16, scale_dtype="float8_e4m3fn"),
    ):
        assert torch.equal(awq_clip(weight, x.t() @ x, spec)[0], mse_qparams(weight, spec)[0])
