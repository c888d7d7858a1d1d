"""`qatkit.search`: formats of somebody's own LightningModule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit import QatkitError, QuantSpec, Scheme, search
from qatkit.data import digits
from qatkit.quantization.prepare import quantized_weights
from qatkit.trials.module_subject import ModuleSubject
from qatkit.trials.variants import Variant

FORMATS = {f"int{bits}": Scheme(QuantSpec(num_bits=bits)) for bits in (8, 4, 2)}


class Mine(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, inputs: Tensor) -> Any:
        return self.net(inputs)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 2e-3)


def trained() -> tuple[Mine, Any]:
    torch.manual_seed(0)
    module, data = Mine(), digits(batch_size=32, seed=0, val_fraction=0.2, test_fraction=0.2)
    data.prepare_data()
    data.setup("fit")
    optimizer = module.configure_optimizers()
    for _ in range(4):
        for index, batch in enumerate(data.train_dataloader()):
            optimizer.zero_grad()
            module.training_step(batch, index).backward()
            optimizer.step()
    return module, data


@pytest.mark.medium
def test_a_module_of_ones_own_is_searched_and_not_changed(tmp_path: Path) -> None:
    module, data = trained()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = search(
        module, data, 0.05, "dense", candidates=FORMATS, steps=20, sparsity="0.5", budget=2.5, quiet=True, out=tmp_path,
        trainer={"accelerator": "cpu"},
    )  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert found.kept
    assert found.promise.samples == 360
    assert any("50% sparsity is left out" in note for note in found.notes), "a dense file stores zeros"
    own = {name.rpartition(".")[0]: spec.num_bits for name, _, (spec) in _bits(found.trained.model())}
    assert own == {each.group: int(each.format.removeprefix("int")) for each in found.decisions}
    content = json.loads((tmp_path / "search.json").read_text())
    assert [step["share"] for step in content["steps"]][-1] == 1.0
    assert Path(found.file).stat().st_size == found.bytes


def _bits(model: nn.Module) -> Any:
    return [(name + ".weight", weight, quantizer.spec) for name, weight, quantizer in quantized_weights(model)]


@pytest.mark.slow
def test_the_latency_of_a_narrower_module_is_measured_in_the_runtime(tmp_path: Path) -> None:
    module, data = trained()
    formats = {name: FORMATS[name] for name in ("int8", "int4")}
    found = search(
        module, data, 0.5, "onnx", candidates=formats, minimize="latency", batch=64, width="0.5", model="net", steps=8,
        out=tmp_path, quiet=True, trainer={"accelerator": "cpu"},
    )  # fmt: skip
    assert found.latency is not None
    assert found.latency["found"]["batch_size"] == 64
    assert any("in int4 instead of int8: " in note for note in found.notes)
    assert found.kept


def test_a_narrower_model_replaces_the_submodule_of_a_copy(tmp_path: Path) -> None:
    module, data = trained()
    own = ("dense", tmp_path, 10, True, None, "net", ["*"], [], {"accelerator": "cpu"}, 0)
    subject = ModuleSubject(module, data, *own)
    narrow = subject.plain(Variant(width=0.5, sparsity=0.25))
    assert [layer.weight.shape for layer in narrow.net if isinstance(layer, nn.Linear)] == [(16, 64), (10, 16)]
    assert module.net[1].weight.shape == (32, 64)
    assert int((narrow.net[1].weight == 0).sum()) == 256
    sizes = [subject.size(subject.plain(Variant(width=width)), {"*": FORMATS["int8"]}) for width in (None, 0.5)]
    assert sizes[1] < sizes[0]
    assert subject.loss()(narrow) > subject.loss()(subject.plain(Variant()))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_loss": 2.0}, "max_loss: 2.0 is out of range"),
        ({"minimize": "memory"}, "minimize: 'memory' is unknown"),
        ({"minimize": "latency", "runtime": "dense"}, "the latency of 'dense' exports is not measured"),
        ({"runtime": "mlx"}, "runtime: a search measures files in their runtime, but MLX does not run"),
        ({"runtime": "onyx"}, "runtime: .*'onyx'"),
        ({"candidates": ["W4"]}, "W4"),
        ({"candidates": FORMATS, "width": "0.5"}, 'width: the module itself cannot be shrunk.*model="model"'),
    ],
)
def test_arguments_are_checked_before_training(arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    module, data = Mine(), digits(batch_size=32, seed=0, val_fraction=0.2, test_fraction=0.2)
    with pytest.raises(QatkitError, match=said):
        search(module, data, **({"runtime": "dense", "out": tmp_path} | arguments))
