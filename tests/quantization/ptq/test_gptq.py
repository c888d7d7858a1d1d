"""GPTQ against its equations, against rounding to nearest, and on its own grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qatkit import QatkitError, QuantSpec, fake_quantize
from qatkit.quantization.estimators import computed_qparams, mse_qparams
from qatkit.quantization.ptq.gptq import gptq

SPECS = [
    QuantSpec(3),
    QuantSpec(4, observer="mse", strategy="tensor"),
    QuantSpec(4, observer="mse", strategy="group", group_size=8),
    QuantSpec(4, symmetric=False, observer="lsq_plus", strategy="group", group_size=16),
    QuantSpec(4, strategy="group", group_size=8, scale_rule="signed", scale_dtype="float16"),
    QuantSpec(8, type="float", strategy="block", block_structure=(4, 12)),
    QuantSpec(4, type="float", strategy="group", group_size=16, scale_dtype="float8_e4m3fn"),
    QuantSpec(4, type="float", strategy="group", group_size=32, scale_dtype="float8_e8m0fnu"),
    QuantSpec(2, type="ternary", observer="mse"),
]


def problem(rows: int = 12, inputs: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs, some a hundred times larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    sizes = torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=generator)]
    x = torch.randn(400, inputs, generator=generator) @ mixing * sizes
    return torch.randn(rows, inputs, generator=generator), x


def cost(x: Tensor, rounded: Tensor, weight: Tensor) -> Tensor:
    """Squared error of every output, from the outputs themselves, in float64."""
    return (x.double() @ (rounded.double() - weight.double()).t()).square().sum(0)


def by_the_equations(weight: Tensor, hessian: Tensor, scale: Tensor, qmax: int, order: list[int]) -> Tensor:
    """One weight at a time with the whole inverse, equations 2 and 3 of the paper; no Cholesky factor, no blocks."""
    weight, inverse, rounded = weight.double().clone(), torch.linalg.inv(hessian), torch.zeros_like(weight).double()
    for q in order:
        rounded[:, q] = (weight[:, q] / scale.double()).round().clamp(-qmax - 1, qmax) * scale.double()
        weight -= ((weight[:, q] - rounded[:, q]) / inverse[q, q])[:, None] * inverse[q]  # equation 2
        inverse -= torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]  # equation 3
        inverse[q], inverse[:, q] = 0.0, 0.0
        inverse[q, q] = 1.0  # out of the problem
    return rounded


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block_size", [1, 5, 128])
def test_it_computes_the_equations_of_the_paper(act_order: bool, block_size: int) -> None:
    weight, x = problem()
    spec = QuantSpec(4)
    hessian = x.double().t() @ x.double() / len(x)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32)
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(32))
    scale, _ = computed_qparams(weight, spec)
    expected = by_the_equations(weight, damped, scale[:, 0], 7, order)
    nearest = fake_quantize(weight, *computed_qparams(weight, spec), spec)
    better = cost(x, expected, weight) <= cost(x, nearest, weight)
    rounded, given_scale, _ = gptq(weight, hessian, spec, block_size=block_size, act_order=act_order)
    assert torch.equal(given_scale, scale)
    assert better.float().mean() > 0.8
    torch.testing.assert_close(rounded[better].double(), expected[better], rtol=1e-6, atol=1e-6)
    assert torch.equal(rounded[~better], nearest[~better])


def test_groups_without_order_take_their_scale_from_what_is_left_when_they_are_reached() -> None:
    """Group by group in float64: errors move to the groups behind, whose range is only then looked at."""
    weight, x = problem()
    spec = QuantSpec(4, strategy="group", group_size=8)
    hessian = x.double().t() @ x.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(32)
    left, inverse = weight.double().clone(), torch.linalg.inv(hessian)
    scales = []
    for q in range(32):
        if q % 8 == 0:
            scales.append(left[:, q : q + 8].abs().amax(1) / 7)
        value = (left[:, q] / scales[-1]).round().clamp(-8, 7) * scales[-1]
        left -= ((left[:, q] - value) / inverse[q, q])[:, None] * inverse[q]
        inverse -= torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
        inverse[q], inverse[:, q] = 0.0, 0.0
        inverse[q, q] = 1.0
    for block_size in (1, 20, 128):  # groups that would straddle two blocks
        _, scale, _ = gptq(weight, x.t() @ x, spec, act_order=False, block_size=block_size)
        same = (scale.double() - torch.stack(scales, 1)).abs().amax(1) < 1e-5
        assert same.float().mean() > 0.8  # the others are rounded to nearest, because that is better


def test_with_order_the_scales_of_groups_are_those_of_the_weight_as_it_was() -> None:
    weight, x = problem()
    spec = QuantSpec(4, strategy="group", group_size=8)
    rounded, scale, _ = gptq(weight, x.t() @ x, spec)
    assert torch.equal(scale, computed_qparams(weight, spec)[0])
    codes = rounded.view(12, 4, 8) / scale[:, :, None]
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)  # groups are neighbours, in the file as well


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [None, 8])
def test_searched_ranges_serve_the_output_better_than_full_ones_and_than_those_best_for_weights(
    bits: int, group_size: int | None
) -> None:
    weight, x = problem(rows=64)
    spec = QuantSpec(bits, observer="mse", strategy="channel" if group_size is None else "group", group_size=group_size)
    searched, scale, _ = gptq(weight, x.t() @ x, spec)
    full, _, _ = gptq(weight, x.t() @ x, replace(spec, observer="minmax"))
    own = fake_quantize(weight, *mse_qparams(weight, spec), spec)
    assert cost(x, searched, weight).sum() < 0.9 * cost(x, full, weight).sum()
    assert cost(x, searched, weight).sum() < 0.9 * cost(x, own, weight).sum()
    assert (scale <= computed_qparams(weight, spec)[0]).all()


@pytest.mark.parametrize("act_order", [False, True])
def test_large_weights_of_inputs_that_hardly_matter_do_not_widen_the_range(act_order: bool) -> None:
    weight, x = problem()
    weight[:, 5] = 15.0
    x[:, 5] *= 1e-4
    spec = QuantSpec(4, observer="mse")
    searched, scale, _ = gptq(weight, x.t() @ x, spec, act_order=act_order)
    assert scale.mean() < 0.5 * mse_qparams(weight, spec)[0].mean()
    full, _, _ = gptq(weight, x.t() @ x, QuantSpec(4), act_order=act_order)
    assert cost(x, searched, weight).sum() < 0.25 * cost(x, full, weight).sum()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.type}{s.num_bits}-{s.strategy}")
def test_the_weight_lies_on_the_grid_of_the_returned_scale(spec: QuantSpec, act_order: bool) -> None:
    weight, x = problem()
    rounded, scale, zero_point = gptq(weight, x.t() @ x, spec, act_order=act_order)
    assert torch.equal(fake_quantize(rounded, scale, zero_point, spec), rounded)
    assert scale.shape == computed_qparams(weight, spec)[0].shape
    nearest = fake_quantize(weight, *mse_qparams(weight, spec), spec)
    assert cost(x, rounded, weight).sum() < cost(x, nearest, weight).sum() * (1.5 if spec.observer == "minmax" else 1)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.type}{s.num_bits}-{s.strategy}")
def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_nearest(
    spec: QuantSpec, act_order: bool
) -> None:
    weight, _ = problem()
    rounded, *qparams = gptq(weight, torch.diag(torch.rand(32) + 0.1), spec, act_order=act_order)
    assert torch.equal(rounded, fake_quantize(weight, *qparams, spec))
    if spec.observer == "minmax":
        assert torch.equal(qparams[0], computed_qparams(weight, spec)[0])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8), inputs=st.sampled_from([4, 8, 24]), order=st.booleans())
def test_no_output_is_worse_than_rounded_to_nearest(seed: int, bits: int, inputs: int, order: bool) -> None:
    weight, x = problem(8, inputs, seed)
    spec = QuantSpec(bits, observer="mse" if order else "minmax", strategy="group", group_size=4)
    rounded, *qparams = gptq(weight, x.t() @ x, spec, act_order=order)
    nearest = fake_quantize(weight, *(qparams if order else computed_qparams(weight, spec)), spec)
    assert (cost(x, rounded, weight) <= cost(x, nearest, weight) * (1 + 1e-4)).all()


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_that_were_always_zero_are_rounded_to_nearest_and_disturb_nothing(act_order: bool) -> None:
    weight, x = problem()
    spec = QuantSpec(4, observer="mse")
    x[:, [3, 17]] = 0
    rounded, *qparams = gptq(weight, x.t() @ x, spec, act_order=act_order)
    nearest = fake_quantize(weight, *qparams, spec)
    assert torch.equal(rounded[:, [3, 17]], nearest[:, [3, 17]])
    assert cost(x, rounded, weight).sum() < 0.8 * cost(x, nearest, weight).sum()
    rounded, *qparams = gptq(weight, torch.zeros(32, 32), spec, act_order=act_order)
    assert torch.equal(rounded, fake_quantize(weight, *qparams, spec))


def test_fewer_rows_than_inputs_are_enough_and_what_cannot_be_factored_is_refused() -> None:
    weight, x = problem()
    rounded, _, _ = gptq(weight, x[:5].t() @ x[:5], QuantSpec(4))
    assert rounded.isfinite().all()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 32, generator=generator)  # float32 cannot factor this with so little damping, ten times can
    assert gptq(weight, rows.t() @ rows, QuantSpec(4), damping=1e-7)[0].isfinite().all()
    broken: list[tuple[dict[str, Any], Tensor, str]] = [
        ({"damping": 0.0}, torch.ones(32, 32), "not positive definite with damping 0.0; use a larger damping"),
        ({}, torch.full((32, 32), torch.nan), "has non-finite values"),
    ]
    for options, hessian, message in broken:
        with pytest.raises(QatkitError, match=message):
            gptq(weight, hessian, QuantSpec(4), **options)
