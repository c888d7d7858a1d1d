"""Masks on a GPU equal those on the CPU, ties included; SparseGPT solutions are as good."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatkit.pruning.gradient import prune_by_gradient
from qatkit.pruning.masks import apply_mask, block_mask, count_zeros, global_masks, magnitude_mask, nm_mask
from qatkit.pruning.one_shot import prune_one_shot

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ties", [False, True])
def test_every_mask_equals_that_of_the_cpu(dtype: torch.dtype, ties: bool) -> None:
    weights = {name: torch.randn(96, size) for name, size in (("a", 128), ("b", 4), ("c", 1000))}
    weights = {name: (4 * weight).round() if ties else weight for name, weight in weights.items()}
    weights = {name: weight.to(dtype) for name, weight in weights.items()}

    def masks(device: str) -> dict[str, Tensor]:
        own = {name: weight.to(device) for name, weight in weights.items()}
        found = {f"global {name}": mask for name, mask in global_masks(own, 0.6).items()}
        found |= {"2:4": nm_mask(own["a"], 2, 4), "4:8": nm_mask(own["c"], 4, 8)}
        return found | {"magnitude": magnitude_mask(own["c"], 0.37), "block": block_mask(own["a"], 0.5, (8, 16))}

    ours, theirs = masks("cuda"), masks("cpu")
    if dtype is torch.float32 and not ties:
        ours.pop("block")  # sums of magnitudes in a different order
    for name, mask in ours.items():
        assert mask.is_cuda
        assert torch.equal(mask.cpu(), theirs[name]), name


def test_pruned_values_become_zero_even_if_non_finite_and_are_counted() -> None:
    weight = torch.randn(64, 64, device="cuda")
    weight[0, 0], weight[1, 1] = torch.nan, torch.inf
    mask = torch.rand(64, 64, device="cuda") > 0.5
    mask[0, 0] = mask[1, 1] = False
    expected = weight.where(mask, 0)
    apply_mask(weight, mask)
    assert torch.equal(weight, expected)
    assert count_zeros({"w": weight}) == {"w": int((~mask).sum())}


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"nm": (2, 4)}], ids=str)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "taylor"])
def test_one_shot_pruning_is_as_good_on_a_gpu_as_on_the_cpu(method: Any, settings: dict[str, Any]) -> None:
    dense = nn.Sequential(nn.Linear(64, 160), nn.ReLU(), nn.Linear(160, 32))
    x = torch.randn(512, 64) @ torch.randn(64, 64)

    def error(device: str) -> float:
        model, own = copy.deepcopy(dense).to(device), x.to(device)
        if method == "taylor":
            prune_by_gradient(model, [own], lambda batch: model(batch).square().mean(), **settings)
        else:
            prune_one_shot(model, list(own.split(128)), method, **settings)
        weights = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        assert count_zeros(weights) == {name: weight.numel() // 2 for name, weight in weights.items()}
        with torch.no_grad():
            return (model(own).cpu() - dense(x)).norm().item()

    assert error("cuda") == pytest.approx(error("cpu"), rel=0.02)
