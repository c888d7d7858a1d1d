"""Folding BatchNorm: the same function, found in any model that can be traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qatkit import QatkitWarning
from qatkit.quantization.folding import fold_batchnorm, replay_folds


class Residual(nn.Module):
    """A block with a branch, inside a module whose own forward cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.free = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.block(x) if x.sum() > -1e9 else x
        return self.free(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.shared, self.bn3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> Any:
        x = x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        y = self.shared(x)
        return self.bn3(y) + y  # the convolution's output is used twice: folding would change the second use


def trained(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    model.train()
    for _ in range(5):
        model(torch.randn(8, 4, 6, 6) * 2 + 1)
    return model.eval()


def test_the_folded_model_computes_the_same_function_and_keeps_what_cannot_be_folded() -> None:
    model, x = trained(Residual()), torch.randn(3, 4, 6, 6)
    expected = model(x)
    with pytest.warns(QatkitWarning, match=r"BatchNorm layers were not folded.*\['block.bn3', 'free'\]"):
        folds = fold_batchnorm(model)
    assert folds == [("block.conv1", "block.bn1"), ("block.conv2", "block.bn2")]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_convolution_over_sequences_is_folded_and_a_linear_layer_is_named() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=4, bias=False), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 4))
    model.append(nn.BatchNorm1d(4))
    for _ in range(5):
        model(torch.randn(8, 4, 6) * 2 + 1)
    x = torch.randn(3, 4, 6)
    expected = model.eval()(x)
    with pytest.warns(QatkitWarning, match=r"BatchNorm layers were not folded.*\['4'\]"):
        folds = fold_batchnorm(model)
    assert folds == [("0", "1")]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    fresh = nn.Sequential(nn.Conv1d(4, 4, 3, groups=4, bias=False), nn.BatchNorm1d(4), *model[2:])
    replay_folds(fresh, folds)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_a_convolution_over_volumes_is_folded() -> None:
    model = nn.Sequential(nn.Conv3d(2, 4, 2, bias=False), nn.BatchNorm3d(4))
    model(torch.randn(4, 2, 3, 3, 3) * 2 + 1)
    x = torch.randn(2, 2, 3, 3, 3)
    expected = model.eval()(x)
    assert fold_batchnorm(model) == [("0", "1")]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_the_folded_weights_and_biases_are_still_trained() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))
    fold_batchnorm(model)
    model(torch.randn(2, 4, 6, 6)).square().sum().backward()
    assert model[0].weight.grad is not None
    assert model[0].bias.grad is not None


def test_a_folded_checkpoint_loads_into_a_fresh_model_after_replaying_the_folds() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    folds = fold_batchnorm(model)
    fresh = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    replay_folds(fresh, folds)
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(fresh(x), model(x))


def test_folding_keeps_frozen_layers_frozen_and_leaves_tied_convolutions_alone() -> None:
    frozen = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)).requires_grad_(False)
    fold_batchnorm(frozen)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    tied = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    tied[2].weight = tied[0].weight
    with pytest.warns(QatkitWarning, match=r"BatchNorm layers were not folded.*\['1', '3'\]"):
        assert fold_batchnorm(tied) == []
    assert tied[2].weight is tied[0].weight
