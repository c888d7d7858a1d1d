"""Errors and warnings of MagnitudePruning, which leave the module unchanged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from qatkit.callbacks import QuantizationAwareTraining
from qatkit.callbacks.pruning import ConstantPruning, MagnitudePruning
from torch import nn
from torch.utils.data import DataLoader

from qatkit import QatkitError, QatkitWarning, scheme
from qatkit.pruning.schedule import Ramp
from tests.callbacks.modules import Classifier, batches, trainer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "sparsity: exactly one of .* is required, got none; pass sparsity=0.5"),
        ({"sparsity": 0.5, "nm": (2, 4)}, "sparsity: exactly one of .* is required, got sparsity and nm"),
        ({"sparsity": 1.0}, "sparsity: 1.0 is out of range"),
        ({"sparsity": 0.0}, "sparsity: 0.0 prunes nothing"),
        ({"sparsity": "0.5"}, "sparsity: '0.5' is out of range"),
        ({"nm": "2:4"}, r"nm: '2:4' is not a pair of integers; use \(2, 4\)"),
        ({"nm": (2, 4, 8)}, r"nm: \(2, 4, 8\) is not a pair"),
        ({"sparsity": 0.5, "block": 4}, r"block: 4 is not a pair of integers; use \(16, 16\)"),
        ({"sparsity": 0.5, "scope": "global"}, "scope: 'global' is unknown; use 'layer' or 'model'"),
        ({"sparsity": 0.5, "scope": "model", "layers": {"*": 0.1}}, "layers: .* no effect with scope='model'"),
        ({"nm": (2, 4), "layers": {"*": 0.1}}, "layers: .* no effect with nm"),
        ({"nm": (2, 4), "scope": "model"}, "scope: 'model' has no effect with nm"),
        ({"sparsity": 0.5, "block": (2, 2), "scope": "model"}, r"block: \(2, 2\) cannot be combined"),
        ({"sparsity": 0.5, "layers": {"a": 2.0}}, r"layers\['a'\]: 2.0 is out of range"),
        ({"sparsity": 0.5, "include": "*"}, r"include: '\*' is not a list of patterns"),
    ],
)
def test_conflicting_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        MagnitudePruning(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.5, "include": ["net.1"]}, r"include\[0\]: 'net.1' matches no linear or convolutional layer"),
        ({"sparsity": 0.5, "layers": {"head": 0.1}}, r"layers\['head'\]: 'head' matches no linear"),
        ({"sparsity": 0.5, "layers": {"*": 0.0}}, r"layers: {'\*': 0.0} leaves no layer to prune"),
        ({"nm": (2, 3)}, r"groups of 3 do not divide the inputs of layer 'net.0', whose weight has shape \[16, 8\]"),
        ({"sparsity": 0.5, "block": (4, 4)}, r"blocks of 4 x 4 do not divide the weight of layer 'net.2'"),
        ({"sparsity": 0.73, "scope": "model"}, r"layer 'net.2' would keep 0 of its 48 weights"),
    ],
)
def test_a_mistake_leaves_the_module_unchanged(settings: dict[str, Any], message: str) -> None:
    module = Classifier()
    with torch.no_grad():
        module.net[2].weight.mul_(1e-6)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(QatkitError, match=message):
        trainer(MagnitudePruning(**settings)).fit(module, batches())
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_training_that_stops_before_the_ramp_ends_warns_of_the_sparsity() -> None:
    class Stops(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 5

    prune = MagnitudePruning(ramp=Ramp(0.8, end=1.0))
    with pytest.warns(
        QatkitWarning,
        match=r"ramp: training ended at a sparsity of 70\.0%, before the ramp reached 80\.0%; .* Ramp\(0\.8, end=0\.5",
    ):
        trainer(prune, Stops(), max_steps=10).fit(Classifier(), batches())


def test_a_ramp_in_training_without_an_end_is_an_error() -> None:
    with pytest.raises(QatkitError, match="ramp: training has no end"):
        trainer(MagnitudePruning(ramp=Ramp(0.5)), max_steps=-1, max_epochs=-1).fit(Classifier(), batches())


@pytest.mark.parametrize("pruning", [MagnitudePruning(0.5, include=["net.0"]), ConstantPruning(include=["net.0"])])
def test_quantization_without_a_value_for_zero_is_refused_for_pruned_layers(pruning: Callback) -> None:
    module = Classifier(nn.Sequential(nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 3)))
    with torch.no_grad():
        module.net[0].weight[:, ::2] = 0
    quantization = QuantizationAwareTraining(scheme("Q4_K").weight, exclude=["net.2"])
    data = [(torch.randn(4, 256), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(QatkitError, match=r"layer 'net\.0': its quantization has no value for zero.*Q3_K"):
        trainer(pruning, quantization).fit(module, DataLoader(data, batch_size=None))  # type: ignore[arg-type]  # a list
