"""OneShotPruning equals the functions on the same batches; WeightRewinding in a user's LightningModule."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from qatkit.callbacks import ConstantPruning, MagnitudePruning, OneShotPruning, SparseRefinedSTE, WeightRewinding
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit import QatkitError, Ramp, magnitude_mask
from qatkit.pruning.gradient import prune_by_gradient
from qatkit.pruning.one_shot import prune_one_shot
from tests.callbacks.modules import Classifier, batches, network, trainer


def loss(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def one_shot(method: Any, **options: Any) -> OneShotPruning:
    forward = loss if method == "taylor" else None
    return OneShotPruning(method, calibration_batches=3, calibration_forward=forward, **options)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "taylor"])
@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"nm": (2, 4)}])
def test_training_starts_from_the_result_of_the_function_and_keeps_its_zeros(
    method: Any, options: dict[str, Any]
) -> None:
    module, expected = Classifier(), network()
    seen = list(islice(batches(), 3))
    if method == "taylor":
        prune_by_gradient(expected, seen, lambda batch: loss(expected, batch), **options)
    else:
        prune_one_shot(expected, [x for x, _ in seen], method, **options)
    trainer(one_shot(method, **options), max_steps=0).fit(module, batches())
    for index in (0, 2):
        assert torch.equal(module.net[index].weight, expected[index].weight)
    trainer(one_shot(method, **options)).fit(trained := Classifier(weight_decay=0.1), batches())
    assert torch.equal(trained.net[0].weight != 0, expected[0].weight != 0)
    assert not torch.equal(trained.net[0].weight, expected[0].weight)


def test_taylor_prunes_the_weights_that_change_the_loss_least() -> None:
    model = network().double()
    (x, y), (x2, y2) = list(batches())[:2]
    scores = [torch.zeros_like(model[i].weight) for i in (0, 2)]
    for inputs, labels in ((x, y), (x2, y2)):
        found = torch.autograd.grad(F.cross_entropy(model(inputs.double()), labels), [model[i].weight for i in (0, 2)])
        scores = [s + (model[i].weight * g).square() for s, i, g in zip(scores, (0, 2), found, strict=True)]
    flat = torch.cat([s.flatten() for s in scores])
    kept = flat >= flat.sort().values[round(0.4 * len(flat))]
    pruned = network()
    prune_by_gradient(pruned, [(x, y), (x2, y2)], lambda b: loss(pruned, b), sparsity=0.4, scope="model")
    assert torch.equal(torch.cat([(pruned[i].weight != 0).flatten() for i in (0, 2)]), kept)
    assert pruned.training
    assert pruned[0].weight.grad is None


@pytest.mark.parametrize("kind", ["one-shot", "srste", "rewinding"])
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    def fit(checkpoint: str | None = None) -> Classifier:
        module = Classifier(weight_decay=0.1)
        save = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
        callbacks: dict[str, list[Any]] = {
            "one-shot": [one_shot("sparsegpt", sparsity=0.5)],
            "srste": [SparseRefinedSTE(decay=0.05)],
            "rewinding": [MagnitudePruning(0.5), WeightRewinding(earlier())],
        }
        options = {"max_epochs": 4, "max_steps": -1, "enable_checkpointing": True}
        trainer(*callbacks[kind], save, **options).fit(module, batches(4), ckpt_path=checkpoint)
        return module

    whole, resumed = fit(), fit(str(tmp_path / "epoch=1.ckpt"))
    assert (whole.net[0].weight == 0).sum() == 64
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def earlier() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return Classifier(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))).state_dict()


def test_rewinding_restores_earlier_weights_under_the_mask() -> None:
    module, weights = Classifier(), earlier()
    masks = [magnitude_mask(module.net[i].weight, 0.5) for i in (0, 2)]
    trainer(MagnitudePruning(0.5), WeightRewinding(weights), max_steps=0).fit(module, batches())
    for index, mask in zip((0, 2), masks, strict=True):
        assert torch.equal(module.net[index].weight, weights[f"net.{index}.weight"] * mask)
        assert torch.equal(module.net[index].bias, weights[f"net.{index}.bias"])


def test_rewinding_that_cannot_work_is_refused() -> None:
    with pytest.raises(QatkitError, match="WeightRewinding requires a pruning callback before it"):
        trainer(WeightRewinding(earlier()), MagnitudePruning(0.5)).fit(Classifier(), batches())
    few = {name: tensor for name, tensor in earlier().items() if name != "net.2.bias"}
    with pytest.raises(QatkitError, match=r"earlier: 1 tensors differ in shape .* such as 'net\.2\.bias'"):
        trainer(MagnitudePruning(0.5), WeightRewinding(few)).fit(Classifier(), batches())
    zero = earlier() | {"net.2.weight": torch.zeros(3, 16)}
    with pytest.raises(QatkitError, match=r"24 kept weights of layer 'net\.2' are 0 in the earlier weights"):
        trainer(MagnitudePruning(0.5), WeightRewinding(zero)).fit(module := Classifier(), batches())
    for index in (0, 2):  # nothing went back
        before = network()[index]
        assert torch.equal(module.net[index].weight, before.weight * magnitude_mask(before.weight, 0.5))
        assert torch.equal(module.net[index].bias, before.bias)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "magic", "sparsity": 0.5}, "method: unknown pruning method 'magic'"),
        ({"method": "wanda"}, "pass sparsity=0.5 or nm"),
        ({"method": "wanda", "sparsity": 1.0}, "sparsity: 1.0 is out of range"),
        (
            {"method": "wanda", "sparsity": 0.5, "scope": "model"},
            "scope: 'model' has no effect without sparsity and method taylor",
        ),
        ({"method": "taylor", "sparsity": 0.5}, "calibration_forward: method 'taylor' needs the loss of a batch"),
    ],
)
def test_invalid_settings_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        OneShotPruning(**arguments)


def test_a_layer_that_does_not_fit_is_named_and_the_module_is_unchanged() -> None:
    def refused(module: Classifier, callback: Any, message: str) -> None:
        before = {key: value.clone() for key, value in module.state_dict().items()}
        with pytest.raises(QatkitError, match=message):
            trainer(callback).fit(module, batches())
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())

    convolution = nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 8, 2), nn.Flatten(), nn.Linear(8, 3))
    refused(
        Classifier(convolution), one_shot("wanda", sparsity=0.5), "'wanda' prunes only linear layers, but layer 'net.1'"
    )
    refused(Classifier(), one_shot("sparsegpt", nm=(2, 3)), "groups of 3 do not divide the inputs of layer 'net.0'")
    refused(Classifier(), one_shot("wanda", sparsity=0.97), "layer 'net.0' would keep 0 of its 128 weights")
    refused(Classifier(), one_shot("sparsegpt", sparsity=0.999), "layer 'net.0' would keep 0 of its 128")
    refused(Classifier(), one_shot("taylor", sparsity=0.999), "layer 'net.0' would keep 0 of its 128")


@pytest.mark.parametrize(
    "callback",
    [
        lambda: MagnitudePruning(0.5),
        lambda: MagnitudePruning(ramp=Ramp(0.5, end=0.5)),
        lambda: ConstantPruning(),
        lambda: SparseRefinedSTE((2, 4)),
        lambda: one_shot("wanda", sparsity=0.5),
    ],
)
def test_adapters_that_start_at_zero_are_refused(callback: Any) -> None:
    from peft import LoraConfig, get_peft_model

    net = get_peft_model(network(), LoraConfig(target_modules=["0"], r=4))
    module = Classifier(net)
    with pytest.raises(
        QatkitError, match=r"the weight of layer 'net\..*\.lora_B\.default' is all zeros.*; exclude the layer"
    ):
        trainer(callback()).fit(module, batches())
