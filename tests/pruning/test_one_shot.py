"""Wanda, SparseGPT and the other scores against their formulas, least squares, and each other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatkit import QatkitError
from qatkit.pruning.masks import nm_mask
from qatkit.pruning.one_shot import prune_one_shot
from qatkit.pruning.scores import add_movement, row_mask, taylor_scores, wanda_scores
from qatkit.pruning.selection import lowest
from qatkit.pruning.sparsegpt import sparsegpt


def correlated(tokens: int, width: int) -> Tensor:
    """Inputs as hidden states are: correlated, and of very different sizes."""
    return torch.randn(tokens, width) @ torch.randn(width, width) * torch.rand(width).square() * 3


def test_wanda_compares_magnitude_times_input_norm_within_each_output() -> None:
    weight, x = torch.randn(6, 10), correlated(50, 10)
    mask = row_mask(wanda_scores(weight, x.norm(dim=0)), 0.3)
    for row in range(6):
        scores = [abs(weight[row, j].item()) * x[:, j].double().norm().item() for j in range(10)]
        pruned = set(sorted(range(10), key=lambda j: scores[j])[:3])
        assert {j for j in range(10) if not mask[row, j]} == pruned


def test_taylor_scores_are_the_change_of_the_loss_to_first_order() -> None:
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def loss(w: Tensor) -> Tensor:
        return (w * torch.arange(1.0, 6.0, dtype=torch.float64)).sin().sum()

    loss(weight).backward()
    assert weight.grad is not None
    scores = taylor_scores(weight, weight.grad)
    for index in range(5):
        step = torch.zeros(5, dtype=torch.float64)
        step[index] = 1e-6 * weight[index].item()
        change = (loss(weight) - loss(weight - step)).item() / 1e-6
        assert scores[index].item() == pytest.approx(change**2, rel=1e-3)


def test_movement_scores_are_high_where_weights_move_away_from_zero() -> None:
    weight = torch.tensor([1.0, -1.0, 1.0, -1.0])
    scores = torch.zeros(4)
    for _ in range(3):  # gradient descent pulls by -gradient
        add_movement(scores, weight, torch.tensor([-1.0, 2.0, 1.0, -2.0]))
    assert scores.tolist() == [3.0, 6.0, -3.0, -6.0]
    assert lowest({"w": scores}, 2, signed=True)["w"].tolist() == [True, True, False, False]


def output_error(weight: Tensor, pruned: Tensor, x: Tensor) -> float:
    return float((x.double() @ (weight - pruned).double().t()).square().sum())


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"sparsity": 0.73}, {"nm": (2, 4)}, {"nm": (1, 3)}])
def test_sparsegpt_is_exact_in_its_zeros_and_beats_wanda_and_magnitude(settings: dict[str, Any]) -> None:
    weight, x = torch.randn(40, 300), correlated(600, 300)
    pruned = sparsegpt(weight, x.t() @ x, **settings)
    if "sparsity" in settings:
        assert (pruned == 0).sum() == round(settings["sparsity"] * weight.numel())
        masks = [row_mask(wanda_scores(weight, x.norm(dim=0)), settings["sparsity"])]
        masks.append(row_mask(weight.abs(), settings["sparsity"]))
    else:
        n, m = settings["nm"]
        assert ((pruned.view(40, -1, m) != 0).sum(dim=2) == n).all()
        masks = [nm_mask(wanda_scores(weight, x.norm(dim=0)), n, m), nm_mask(weight, n, m)]
    wanda, magnitude = (output_error(weight, weight * mask, x) for mask in masks)
    assert output_error(weight, pruned, x) < 0.8 * wanda < 0.8 * magnitude


def test_sparsegpt_leaves_the_least_squares_solution_after_the_first_zero() -> None:
    weight, x = torch.randn(1, 6, dtype=torch.float64), correlated(40, 6).double()
    gram = x.t() @ x
    weight[0, 0] = 1e-3  # certainly the cheapest, and all other columns stand behind it
    pruned = sparsegpt(weight, gram, sparsity=1 / 6, damp=0.0)
    expected = torch.linalg.lstsq(x[:, 1:], x @ weight[0]).solution
    assert pruned[0, 0] == 0
    torch.testing.assert_close(pruned[0, 1:], expected, atol=1e-9, rtol=0)


def test_inputs_that_are_always_zero_are_pruned_first() -> None:
    weight, x = torch.randn(4, 8) + 5, correlated(30, 8)
    x[:, [2, 5]] = 0
    pruned = sparsegpt(weight, x.t() @ x, sparsity=0.25)
    assert (pruned[:, [2, 5]] == 0).all()
    assert (pruned != 0).sum() == 24


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(3))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"nm": (2, 4)}])
def test_a_model_is_pruned_block_by_block(method: Any, settings: dict[str, Any]) -> None:
    model, batches = Blocks().train(), [correlated(64, 32).view(4, 16, 32) for _ in range(3)]
    dense, state = copy.deepcopy(model), torch.get_rng_state()
    names = prune_one_shot(model, iter(batches), method, **settings, exclude=["head"])
    assert names == [f"layers.{i}.{j}" for i in range(3) for j in (0, 2)]
    assert all((model.get_submodule(name).weight == 0).float().mean() == 0.5 for name in names)
    assert torch.equal(model.head.weight, dense.head.weight)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    magnitude = copy.deepcopy(dense)
    with torch.no_grad():
        for name in names:
            weight = magnitude.get_submodule(name).weight
            weight.mul_(nm_mask(weight, 2, 4) if "nm" in settings else row_mask(weight.abs(), 0.5))
        errors = [sum((m(x) - dense(x)).square().sum() for x in batches) for m in (model, magnitude)]
    assert errors[0] < errors[1]


def test_later_blocks_get_the_outputs_of_the_pruned_ones() -> None:
    model, x = Blocks(), correlated(256, 32)
    prune_one_shot(model, [x], "sparsegpt", sparsity=0.5)
    first = copy.deepcopy(Blocks())
    prune_one_shot(first, [x], "sparsegpt", sparsity=0.5, include=["layers.0.*"])
    with torch.no_grad():
        hidden = x + first.layers[0](x)
    dense = Blocks().layers[1][0].weight
    torch.testing.assert_close(model.layers[1][0].weight, sparsegpt(dense, hidden.t() @ hidden, 0.5))


def test_mistakes_are_named() -> None:
    model = Blocks()
    model.unused = nn.Linear(4, 4)
    for settings, message in (
        ({"sparsity": 0.5}, "the batches never reach layer 'unused'"),
        ({}, "pass sparsity=0.5 or nm"),
        ({"sparsity": 0.5, "nm": (2, 4)}, "pass sparsity=0.5 or nm"),
        ({"sparsity": 1.5}, "sparsity: 1.5 is out of range"),
        ({"nm": (2, 5)}, "groups of 5 do not divide the inputs of layer 'layers.0.0'"),
        ({"sparsity": 0.5, "method": "obs"}, "method: unknown pruning method 'obs'; use one of magnitude"),
    ):
        with pytest.raises(QatkitError, match=message):
            prune_one_shot(model, [torch.randn(2, 32)], **settings)
    with pytest.raises(QatkitError, match="batches: no batches were passed"):
        prune_one_shot(model, [], sparsity=0.5)
    for method in ("wanda", "sparsegpt"):
        with pytest.raises(QatkitError, match=r"the inputs of layer 'layers\.0\.0' are non-finite"):
            prune_one_shot(Blocks(), [torch.full((2, 32), torch.nan)], method, sparsity=0.5)


def test_input_statistics_are_summed_in_float32_when_the_model_runs_in_bfloat16() -> None:
    # the batches are bfloat16 numbers already, so the first layer sees the same inputs either way
    batches, found = [correlated(64, 32).bfloat16().float() for _ in range(8)], []
    for mixed in (False, True):
        model = Blocks()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            prune_one_shot(model, batches, "sparsegpt", sparsity=0.5, include=["layers.0.0"])
        found.append(model.layers[0][0].weight)
    assert torch.equal(*found)


def test_sparsegpt_keeps_old_zeros_and_counts_them() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 256)
    weight[:, :128] = 0
    x = torch.randn(512, 256)
    x[:, 200:220] = 0  # inputs that are always 0 cost as little as old zeros
    for sparsity in (0.5, 0.6, 0.75):
        pruned = sparsegpt(weight, x.t() @ x, sparsity)
        assert not pruned[:, :128].any()
        assert int((pruned == 0).sum()) == round(sparsity * weight.numel())
    scattered = weight.flip(1) * (torch.rand(16, 256) > 0.3)
    pruned = sparsegpt(scattered, x.t() @ x, nm=(2, 4))
    assert not pruned[scattered == 0].any()
