"""`explain` names the layer whose weight, scale or arithmetic differs in a file, and tells flips from larger errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from qatkit import QatkitWarning, QuantSpec, calibrate, prepare_qat, scheme
from qatkit.cli.main import app
from qatkit.export.compressed.format import export_compressed
from qatkit.export.dense import export_dense
from qatkit.export.explanation import OUTPUTS, explain
from qatkit.export.gguf.format import export_gguf
from qatkit.export.onnx.format import export_onnx
from qatkit.models import llama
from tests.export.conftest import Images, Quantized
from tests.export.files import change_constant, constants

TOKENS = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": TOKENS, "labels": TOKENS}
DAMAGED = ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj")
UINT8 = QuantSpec(symmetric=False, strategy="tensor")
TABLES = pytest.mark.parametrize("layer", DAMAGED)


def text_model(weight: QuantSpec | None, activation: QuantSpec | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = llama(64, 32, 2, 2, 1, 64, 32, tie_embeddings=False).eval()
    if weight is not None:
        prepare_qat(model, weight, activation)
        calibrate(model, [BATCH], lambda batch: model(batch["input_ids"]))
    return model


def doubled(values: Any) -> None:
    values.flat[0] *= 2


def change_gguf(path: Path, change: Callable[[Any], None], name: str) -> None:
    reader = gguf.GGUFReader(path, "r+")
    change(next(tensor.data for tensor in reader.tensors if tensor.name == name))
    reader.data.flush()


def named(found: Any, layer: str, kind: str = "own") -> None:
    assert found.first is not None, found.text
    assert (found.first.layer, found.first.kind, found.larger) == (layer, kind, None), found.text
    assert f"'{layer}' ({found.first.scheme})" in found.text
    assert found.skipped == {}


def test_a_damaged_scale_of_an_onnx_file_is_named(quantized: Quantized, images: Images, tmp_path: Path) -> None:
    model, path, batch = quantized(weight=QuantSpec(7)), tmp_path / "model.onnx", (images[0][:64], images[1][:64])
    export_onnx(model, batch[0], path)
    kept = path.read_bytes()
    assert explain(model, path, [batch]).first is None
    for layer in ("conv1", "conv2", "classifier"):
        change_constant(path, f"{layer}.weight.scale", doubled)
        found = explain(model, path, [batch])
        named(found, layer)
        assert found.layers == 4
        assert found.first is not None
        assert found.first.scheme == "7-bit int weight per channel, 8-bit int input per tensor"
        path.write_bytes(kept)
    change_constant(path, "conv3.input.scale", doubled)
    named(explain(model, path, [batch]), "conv3")


@pytest.mark.slow
@TABLES
@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        (QuantSpec(7), UINT8),
        (QuantSpec(7), QuantSpec(symmetric=False, strategy="tensor", dynamic=True)),
        (QuantSpec(8), None),
        (QuantSpec(4, strategy="group", group_size=32), None),
        (QuantSpec(4, strategy="group", group_size=32), QuantSpec(8, strategy="group", group_size=32)),
    ],
    ids=["static", "dynamic", "decoded", "packed", "level4"],
)
def test_a_damaged_scale_of_a_decoder_in_onnx_is_named(
    weight: QuantSpec, activation: QuantSpec | None, layer: str, tmp_path: Path
) -> None:
    model, path = text_model(weight, activation), tmp_path / "model.onnx"
    export_onnx(model, {"input_ids": TOKENS}, path)
    first = explain(model, path, [BATCH]).first
    assert first is None or first.kind == "flip"
    change_constant(path, f"{layer}.weight.scale", doubled)
    found = explain(model, path, [BATCH])
    assert found.layers == 15
    assert found.first is not None
    own = found.larger or found.first
    assert (own.layer, own.kind) == (layer, "own"), found.text


@TABLES
def test_a_damaged_scale_of_a_compressed_folder_is_named(layer: str, tmp_path: Path) -> None:
    model = text_model(QuantSpec(4, strategy="group", group_size=32))
    export_compressed(model, tmp_path / "out")
    assert explain(model, tmp_path / "out", [BATCH]).first is None
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    doubled(tensors[f"{layer}.weight_scale"].numpy())
    save_file(tensors, file, metadata={"format": "pt"})
    named(explain(model, tmp_path / "out", [BATCH]), layer)


@TABLES
def test_a_damaged_scale_of_a_gguf_file_is_named(layer: str, tmp_path: Path) -> None:
    model, path = text_model(scheme("Q4_0").weight), tmp_path / "model.gguf"
    export_gguf(model, path)
    found = explain(model, path, [BATCH])
    assert (found.first, found.layers, found.batches) == (None, 21, 1)
    assert found.text == "no layer differs: the outputs of 21 layers are equal over 1 batches"
    own = {"self_attn.q_proj": "attn_q", "mlp.down_proj": "ffn_down", "mlp.up_proj": "ffn_up"}
    _, _, number, part = layer.split(".", 3)
    change_gguf(path, lambda rows: doubled(rows[2, :2].view(np.float16)), f"blk.{number}.{own[part]}.weight")
    found = explain(model, path, [BATCH])
    named(found, layer)
    assert found.first is not None
    assert found.first.scheme == "Q4_0"


def test_one_ulp_of_a_norm_is_named_as_rounding(tmp_path: Path) -> None:
    model, path = text_model(scheme("Q4_0").weight), tmp_path / "model.gguf"
    export_gguf(model, path)

    def one_ulp(values: Any) -> None:
        values[5] = np.nextafter(values[5], np.float32(9))

    change_gguf(path, one_ulp, "blk.1.attn_norm.weight")
    found = explain(model, path, [BATCH])
    assert found.first is not None
    assert (found.first.layer, found.first.kind) == ("model.layers.1.input_layernorm", "rounding")
    assert found.first.scheme == "not quantized"


class Shifted(nn.Module):
    """Two layers with an addition between them that is no layer."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.first, self.second, self.shift = nn.Linear(8, 8), nn.Linear(8, 4), shift

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + self.shift)


def test_a_rounding_flip_an_inherited_and_a_larger_difference_are_told_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained, x = Shifted(0.0).eval(), torch.randn(512, 8)
    prepare_qat(trained, QuantSpec(7), UINT8)
    calibrate(trained, [x])
    batch, path = (x, torch.zeros(512).long()), tmp_path / "model.onnx"

    def explained(shift: float, damage: bool = False) -> Any:
        trained.shift = shift
        export_onnx(trained, x, path)
        trained.shift = 0.0
        if damage:
            change_constant(path, "second.weight.scale", doubled)
        return explain(trained, path, [batch])

    assert explained(0.0).first is None
    found = explained(2e-5)
    named(found, "second", "flip")
    assert found.text.endswith("No layer differs by more")
    assert 0 < found.first.input_error < 4e-5 < found.first.max_error
    found = explained(0.5)
    named(found, "second", "inherited")
    assert found.first.input_error == pytest.approx(0.5, rel=1e-3)
    named(explained(2e-5, damage=True), "second", "own")


def test_a_difference_after_the_last_layer_and_a_flip_before_a_damaged_layer_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), nn.Softmax(-1)).eval(), torch.randn(64, 8)
    other = nn.Sequential(*model[:2])
    export_onnx(other, x, tmp_path / "model.onnx")
    found = explain(model, tmp_path / "model.onnx", [(x, torch.zeros(64).long())])
    assert found.first is not None
    assert (found.first.layer, found.first.kind) == (OUTPUTS, "inherited")


def test_a_dense_file_is_compared_without_the_quantization_of_activations(tmp_path: Path) -> None:
    model, path = text_model(QuantSpec(4), UINT8), tmp_path / "model.safetensors"
    export_dense(model, path)
    assert explain(model, path, [BATCH]).first is None
    tensors = load_file(path)
    tensors[f"{DAMAGED[0]}.weight"][3] *= 1.5
    save_file(tensors, path)
    named(explain(model, path, [BATCH]), DAMAGED[0])


def test_layers_inside_larger_operators_are_listed_and_other_formats_refuse_by_name(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True)).eval(), torch.randn(4, 5, 8)
    prepare_qat(model, QuantSpec(7))
    export_onnx(model, x, tmp_path / "model.onnx")
    found = explain(model, tmp_path / "model.onnx", [(x, x)], forward=lambda model, batch: model(batch[0]))
    assert (found.layers, found.first) == (1, None)
    assert "Not compared: '1.weight_ih_l0' (no node of the graph computes its output alone)" in found.text
    (tmp_path / "model.xml").write_text("")
    found = explain(model, tmp_path / "model.xml", [])
    assert found.text.startswith("'openvino' cannot be walked layer by layer: its runtime does not return")
    (tmp_path / "model.onnx").write_text("damaged")
    found = explain(model, tmp_path / "model.onnx", [BATCH])
    assert found.text.startswith("'onnx' cannot be walked layer by layer: ")


@pytest.mark.slow
def test_the_command_names_the_damaged_layer(tmp_path: Path) -> None:
    from tests.pipeline.test_several_formats import ALLOW, RECIPE

    (tmp_path / "both.yaml").write_text(RECIPE.replace("sparse", "onnx"))
    run = [str(tmp_path / "both.yaml"), "--out", str(tmp_path / "run"), "--quiet", *ALLOW]
    assert CliRunner().invoke(app, ["run", *run]).exit_code == 0
    out = tmp_path / "run"
    path = out / "export" / "qat" / "onnx" / "model.onnx"
    scale = next(name for name in constants(path) if name.endswith("weight.scale"))
    change_constant(path, scale, doubled)
    with pytest.warns(QatkitWarning, match="the file changed after it was verified"):
        result = CliRunner().invoke(app, ["verify", str(out), "--explain", *ALLOW])
    assert result.exit_code == 1, (result.output, result.exception)
    text = " ".join(result.output.split())
    layer = scale.removesuffix(".weight.scale")
    assert f"qat/onnx: layer by layer, the first output that differs is that of '{layer}'" in text
    assert "qat: layer by layer, no layer differs" in text
    checked = json.loads(CliRunner().invoke(app, ["verify", str(out), "--explain", "--json", *ALLOW]).output)
    assert checked["qat/onnx"]["explanation"]["first"]["kind"] == "own"
