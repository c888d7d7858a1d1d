"""LiteRT, with its default kernels, reads the trained codes and computes the trained outputs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qatkit import QuantSpec, calibrate, export_model, prepare_qat
from qatkit.export.litert import operators
from qatkit.export.litert.content import decode, encode
from qatkit.models import cnn, mlp, resnet
from qatkit.quantization import prepare_for_target
from tests.cli.in_process import qatkit
from tests.test_docs import ROOT, blocks, write_named_blocks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "QATKIT_LITERT" not in os.environ, reason="QATKIT_LITERT is not the interpreter of a LiteRT environment"
    ),
]
A8 = QuantSpec(8, symmetric=False, strategy="tensor")


class Varied(nn.Module):
    """Padding that LiteRT's SAME is not, convolutions per channel and in groups, and floating-point operations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.channel, self.groups = nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.Conv2d(16, 16, 3, 1, 2, 2, groups=4)
        self.hardswish, self.relu6, self.pool = nn.Hardswish(), nn.ReLU6(), nn.MaxPool2d(3, 2, 1)
        self.average, self.head = nn.AvgPool2d(2), nn.Linear(16 * 4 + 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu6(self.channel(self.hardswish(self.norm(self.stem(x))))))
        z = self.groups(x) * x
        return self.head(torch.cat([self.average(z).flatten(1), z.mean((2, 3))], 1))


class TwoOutputs(nn.Module):
    """Two inputs, and two outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        both = torch.relu(self.a(x)) + self.b(y)
        return {"sum": both, "softmax": both.softmax(-1)}


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(64, (32, 32)), (1, 8, 8)),
    "cnn": (lambda: cnn((8, 8)), (1, 8, 8)),
    "residual": (lambda: resnet((8, 16)), (1, 8, 8)),
    "varied": (Varied, (3, 16, 16)),
    "three dimensions": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), (5, 8)),
}
HOWS = ("target", "layers", "symmetric", "weights", "4 bits", "float")


def built(name: str, how: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[name][0]().eval(), torch.randn(70, *MODELS[name][1])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor, 0, 0.3)  # type: ignore[arg-type]
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 2)  # type: ignore[arg-type]
    if how == "target":
        prepare_for_target(model, "litert", x)
    elif how == "layers":
        prepare_qat(model, QuantSpec(8), A8)
    elif how == "symmetric":
        prepare_for_target(model, "litert", x, QuantSpec(7, strategy="tensor"), QuantSpec(8, strategy="tensor"))
    elif how == "weights":
        prepare_qat(model, QuantSpec(8))
    elif how == "4 bits":
        prepare_for_target(model, "litert", x, QuantSpec(4, observer="mse"))
    if how not in ("weights", "float"):
        calibrate(model, [x])
    return model, x


def python() -> Path:
    return Path(os.environ["QATKIT_LITERT"])


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", MODELS)
def test_litert_computes_what_was_trained(name: str, how: str, tmp_path: Path) -> None:
    model, x = built(name, how)
    more = torch.rand(33, *x.shape[1:]) * 3 - 1  # the size of the batch varies
    batches = [(value, torch.zeros_like(model(value))) for value in (x, more)]
    path = tmp_path / "model.tflite"
    result = export_model(model, "litert", path, batches, task="regression", python=python())
    assert result.passed, result.failures
    assert (result.runtime.split(".")[0], result.not_run) == ("LiteRT 2", "")
    assert result.max_error is not None
    if how == "target":  # at most one step of the output, and none without additions of codes
        with torch.no_grad():
            step = float(max(model(x).unique().diff().min(), 1e-3))
        assert result.max_error <= (step * 1.001 if name == "residual" else 0)


def test_several_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, y = TwoOutputs().eval(), torch.randn(9, 6), torch.randn(9, 6)
    prepare_for_target(model, "litert", (x, y))
    calibrate(model, [(x, y)], forward=lambda batch: model(*batch))
    result = export_model(
        model, "litert", tmp_path / "model.tflite", [{"x": x, "y": y, "labels": torch.zeros(9, 8)}], task="regression",
        forward=lambda model, batch: model(batch["x"], batch["y"])["sum"], python=python(),
    )  # fmt: skip
    assert result.passed, result.failures


def test_a_graph_that_computes_something_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = built("cnn", "target")
    monkeypatch.setattr(operators, "_RELU", np.int8(2))  # LiteRT's number of a clip to -1..1
    result = export_model(model, "litert", tmp_path / "model.tflite", [(x, torch.zeros(70).long())], python=python())
    assert not result.passed
    assert result.failures[0].startswith("outputs: the mean difference from the trained model is ")


def test_litert_reads_the_changed_value_of_a_file(tmp_path: Path) -> None:
    from qatkit.export.verification import verify

    model, x = built("cnn", "target")
    batches = [(x, torch.zeros(70).long())]
    path = tmp_path / "model.tflite"
    assert export_model(model, "litert", path, batches, python=python()).passed
    data = bytearray(path.read_bytes())
    tensor = next(each for each in decode(bytes(data)).tensors if each.name == "conv2.weight")
    assert tensor.values is not None
    where = data.index(tensor.values.tobytes())
    data[where] ^= 1
    path.write_bytes(bytes(data))
    assert (
        "layer 'conv2': codes of the weight: 1 of 576 differ"
        in verify(model, path, batches, python=python()).failures[0]
    )
    content = decode(bytes(data))
    content.operators[0] = replace(content.operators[0], code=32)  # a custom operator that nobody knows
    path.write_bytes(encode(content))
    assert not verify(model, path, batches, python=python()).passed


def test_the_page_works_in_litert(tmp_path: Path) -> None:
    page = ROOT / "docs" / "litert.md"
    write_named_blocks(page, tmp_path)
    (command,) = blocks(page, "bash")
    assert qatkit(*command.split()[1:], cwd=tmp_path).code == 0
    done = qatkit("verify", "runs/phone", "--python", str(python()), cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.count("computed by LiteRT 2.") == 2
    interpreter = f"export.python={python()}"
    assert qatkit("run", "phone.yaml", interpreter, "--out", "runs/at_once", "--quiet", cwd=tmp_path).code == 0
    rows = json.loads((tmp_path / "runs/at_once/report.json").read_text())["rows"]
    assert [row["verification"]["not_run"] for row in rows] == ["", ""]
    card = (tmp_path / "runs/phone/export/int8/litert/README.md").read_text()
    assert "from ai_edge_litert.interpreter import Interpreter" in card
