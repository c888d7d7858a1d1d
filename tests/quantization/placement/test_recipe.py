"""A recipe that names its runtime: trained, exported and verified with the quantizers of the results."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from qatkit.export.onnx.runtime import integer_kernels
from qatkit.export.onnx.saturation import saturates
from qatkit.quantization.placement.points import placement_of
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.cli.in_process import qatkit

RECIPE = """
name: placed
model: {factory: "qatkit.models:resnet", args: {channels: [4, 8]}}
data: {factory: "qatkit.data:digits", args: {val_fraction: 0.1, test_fraction: 0.1}}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 20, batch_size: 32, lr: 1.0e-2}
  int7:
    max_steps: 10
    batch_size: 32
    lr: 1.0e-3
    distill: {temperature: 2.0}
    quantize: {target: onnxruntime}
export: {format: onnx}
"""


class Reader(nn.Module):
    """A recurrent network that reads images ``[batch, 1, 8, 8]`` row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(x[:, 0])[0][:, -1])
        return logits


def hardswish() -> nn.Module:
    """A network as MobileNetV3's blocks are."""
    parts = [nn.Conv2d(1, 4, 3), nn.Hardswish(), nn.Conv2d(4, 4, 3), nn.Hardswish(), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*parts)


@pytest.mark.filterwarnings("ignore:.*changed after it was verified:qatkit.errors.QatkitWarning")
def test_the_run_is_verified_and_every_product_is_an_integer_product(tmp_path: Path) -> None:
    (tmp_path / "placed.yaml").write_text(RECIPE)
    done = qatkit("run", "placed.yaml", "--out", "run", cwd=tmp_path)
    assert done.code == 0, done.err
    run = Run(load_recipe(tmp_path / "placed.yaml"), tmp_path / "run", [])
    model = run.load_model("int7")
    assert [point.part for point in placement_of(model).points].count(
        "output"
    ) == 15  # of 3 x 4 in blocks, stem, shortcut and pooling
    file = tmp_path / "run" / "export" / "int7" / "onnx" / "model.onnx"
    assert integer_kernels(file).floating == {}
    kinds = Counter(node.op_type for node in onnx.load(file).graph.node)
    assert kinds["GlobalAveragePool"] == 1
    assert qatkit("verify", "run", cwd=tmp_path).code == 0

    changed = onnx.load(file)
    scale = next(tensor for tensor in changed.graph.initializer if tensor.name == "1.0.relu2.output.scale")
    value = torch.tensor([1.0])
    value[0] = torch.frombuffer(bytearray(scale.raw_data), dtype=torch.float32)[0] * (1 + 2**-22)
    scale.raw_data = value.numpy().tobytes()
    onnx.save(changed, file)
    done = qatkit("verify", "run", "--json", cwd=tmp_path)
    assert done.code == 1
    assert "result '1.0.relu2.output': scale" in done.out


def test_eight_bits_stay_signed_for_a_processor_that_adds_in_32_bits(tmp_path: Path) -> None:
    text = RECIPE.replace("target: onnxruntime", "target: onnxruntime-vnni").replace("max_steps: 20", "max_steps: 2")
    (tmp_path / "placed.yaml").write_text(text.replace("resnet", "mlp").replace("channels: [4, 8]", "in_features: 64"))
    assert qatkit("run", "placed.yaml", "--out", "run", "--quiet", cwd=tmp_path).code == int(saturates())
    graph = onnx.load(tmp_path / "run" / "export" / "int7" / "onnx" / "model.onnx").graph
    codes = [tensor for tensor in graph.initializer if tensor.name.endswith("weight.codes")]
    assert {tensor.data_type for tensor in codes} == {onnx.TensorProto.INT8}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("target: onnxruntime", "target: onnxruntim", "did you mean 'onnxruntime'"),
        ("{format: onnx}", "{format: dense}", "'dense' is not the format of target 'onnxruntime' in stage 'int7'"),
        ("onnxruntime}", "onnxruntime, activation: {strategy: token}}", "activation.strategy: 'token' is not supp"),
    ],
)
def test_mistakes_are_answered_by_validate(old: str, new: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "placed.yaml").write_text(RECIPE.replace(old, new))
    done = qatkit("validate", "placed.yaml", cwd=tmp_path)
    assert done.code == 2
    assert words in done.err


@pytest.mark.filterwarnings("default:.*Hardswish:qatkit.errors.QatkitWarning")
def test_an_activation_function_that_costs_the_speed_is_named_by_validate(tmp_path: Path) -> None:
    text = RECIPE.replace("qatkit.models:resnet", f"{__name__}:hardswish").replace("{channels: [4, 8]}", "{}")
    (tmp_path / "placed.yaml").write_text(text)
    done = qatkit("validate", "placed.yaml", "--allow", "tests", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "'1' and 1 more: Hardswish runs in floating point between integer layers" in done.err
    (tmp_path / "placed.yaml").write_text(text.replace("target: onnxruntime", "target: onnxruntime-vnni"))
    assert "Hardswish" not in qatkit("validate", "placed.yaml", "--allow", "tests", cwd=tmp_path).err


@pytest.mark.filterwarnings("default:.*integer matrix products in OpenVINO:qatkit.errors.QatkitWarning")
def test_linear_layers_that_are_slower_in_openvino_are_named_by_validate(tmp_path: Path) -> None:
    text = RECIPE.replace("target: onnxruntime", "target: openvino").replace("format: onnx", "format: openvino")
    mlp = text.replace("qatkit.models:resnet", "qatkit.models:mlp").replace("{channels: [4, 8]}", "{in_features: 64}")
    (tmp_path / "placed.yaml").write_text(mlp)
    done = qatkit("validate", "placed.yaml", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "on processors without VNNI, integer matrix products in OpenVINO are slower" in done.err
    for other in (text, mlp.replace("target: openvino", "target: openvino-vnni")):
        (tmp_path / "placed.yaml").write_text(other)
        assert "OpenVINO are slower" not in qatkit("validate", "placed.yaml", cwd=tmp_path).err


@pytest.mark.filterwarnings("default:.*recurrent layer run as a loop:qatkit.errors.QatkitWarning")
def test_a_recurrent_layer_that_would_run_as_a_loop_is_named_by_validate(tmp_path: Path) -> None:
    text = RECIPE.replace("qatkit.models:resnet", f"{__name__}:Reader").replace("{channels: [4, 8]}", "{}")
    recipe = tmp_path / "placed.yaml"
    recipe.write_text(text)
    done = qatkit("validate", "placed.yaml", "--allow", "tests", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "layer 'rnn': with target 'onnxruntime', the steps of a recurrent layer run as a loop" in done.err
    for other in ("target: onnxruntime-dynamic", 'target: onnxruntime, layers: {"rnn": {weight: {num_bits: 8}}}'):
        recipe.write_text(text.replace("target: onnxruntime", other))
        done = qatkit("validate", "placed.yaml", "--allow", "tests", cwd=tmp_path)
        assert done.code == 0, done.err
        assert "loop" not in done.err
