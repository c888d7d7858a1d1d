"""Exported OpenVINO models in OpenVINO: exact integers, integer kernels, dynamic dimensions, and refusals."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qatkit import QatkitError, QatkitWarning, QuantSpec, Scheme, calibrate, prepare_qat
from qatkit.export.formats import FORMATS, format_of_path
from qatkit.export.onnx.format import export_onnx
from qatkit.export.onnx.saturation import saturates
from qatkit.export.openvino.format import export_openvino
from qatkit.export.openvino.rounding import openvino_grid
from qatkit.export.openvino.runtime import load_openvino, openvino_kernels
from qatkit.export.verification import verify
from qatkit.models import untrained_model
from qatkit.quantization import prepare_for_target
from qatkit.quantization.modules import FakeQuantize
from tests.cli.in_process import qatkit
from tests.export.conftest import UINT8
from tests.quantization.placement.networks import Denoiser, Dense, ResNet, UNet, trained_like

openvino = pytest.importorskip("openvino")

SHAPE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
RECIPE = """
name: served
model: {factory: "qatkit.models:resnet", args: {channels: [4, 8]}}
data: {factory: "qatkit.data:digits", args: {val_fraction: 0.1, test_fraction: 0.1}}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 20, batch_size: 32, lr: 1.0e-2}
  int7: {max_steps: 5, batch_size: 32, quantize: {target: openvino}}
export: {format: openvino}
"""


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.ReLU(), nn.Linear(32, 10))


def prepared(model: nn.Module, target: str, x: Tensor) -> nn.Module:
    prepare_for_target(trained_like(model), target, x[:2])
    calibrate(model, [x])
    return model.eval()


def images(count: int = 64) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("target", ["openvino", "openvino-vnni"])
@pytest.mark.parametrize(
    ("kind", "products"),
    [
        (mlp, {"FullyConnected": 2}),
        (ResNet, {"Convolution": 6, "FullyConnected": 1}),
        (Dense, {"Convolution": 3, "FullyConnected": 1}),
        (UNet, {"Convolution": 3}),
        (Denoiser, {"Convolution": 2}),
    ],
)
@pytest.mark.filterwarnings("error")
def test_every_product_runs_in_integers_and_the_outputs_are_the_trained_ones(
    kind: Any, products: Mapping[str, int], target: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = images()
    model, path = prepared(kind(), target, x), tmp_path / "model.xml"
    export_openvino(model, x[:2], path, target=target)
    kernels = openvino_kernels(path)
    assert (kernels.integer, kernels.floating) == (products, {})
    with torch.no_grad():
        labels = model(x).argmax(1)
    result = verify(model, path, [(x, labels)], threads=1, task="segmentation" if labels.dim() == 3 else None)
    if target == "openvino-vnni" and saturates():  # not the processor that was declared
        assert "saturate for the signed 8-bit weights" in result.failures[0]
    else:
        assert result.passed, result.failures
    assert result.format == "openvino"


def test_residual_additions_run_inside_the_convolutions(tmp_path: Path) -> None:
    x = images(8)
    model, path = prepared(ResNet(), "openvino", x), tmp_path / "model.xml"
    export_openvino(model, x, path, target="openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = [str(node.get_rt_info()["layerType"].value) for node in compiled.get_runtime_model().get_ops()]
    assert kinds.count("Convolution") == 6
    assert "Eltwise" not in kinds


def test_integers_stay_integers_in_the_file(tmp_path: Path) -> None:
    x = images(4)
    model, path = prepared(mlp(), "openvino", x), tmp_path / "model.xml"
    export_openvino(model, x, path, target="openvino")
    layer: Any = model[1]  # type: ignore[index]
    scale, _ = layer.weight_fake_quant.qparams(layer.weight)
    codes = (layer.weight / scale).round().to(torch.int8).numpy().tobytes()
    stored = path.with_suffix(".bin").read_bytes()
    assert codes in stored
    assert len(stored) < 1.1 * (768 * 32 + 32 * 10)
    assert FORMATS["openvino"].size(path) == len(stored) + path.stat().st_size
    assert format_of_path(path).name == "openvino"


def test_texts_of_any_length_and_number_run_with_named_inputs_and_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = untrained_model("bert", "SequenceClassification", SHAPE, num_classes=3).eval()
    ids = torch.randint(50, (64, 8))
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tables = {"*_embeddings": Scheme(QuantSpec(8))}
    prepare_for_target(model, "openvino", texts, include=["*", "*_embeddings"], layers=tables)
    calibrate(model, [texts], forward=lambda batch: model(**batch))
    path = tmp_path / "model.xml"
    export_openvino(model.eval(), texts, path, target="openvino")
    shorter = {"input_ids": ids[:3, :5], "attention_mask": torch.ones_like(ids[:3, :5])}
    with torch.no_grad():
        torch.testing.assert_close(load_openvino(path, 1)(**shorter)["logits"], model(**shorter).logits)
    assert load_openvino(path).inputs == ["input_ids", "attention_mask"]
    assert openvino_kernels(path).integer == {"FullyConnected": 14}
    result = verify(model, path, [{**texts, "labels": torch.zeros(64).long()}], threads=1)
    assert result.passed, result.failures


def test_several_outputs_are_returned_as_the_model_returns_them(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Any]:
            y = self.body(x)
            return {"logits": y, "boxes": (y * scale, y + 1)}

    model, x = Two().eval(), torch.rand(5, 4)
    export_openvino(model, (x, x[:, :1]), tmp_path / "model.xml")
    runtime = load_openvino(tmp_path / "model.xml", 1)
    with torch.no_grad():
        torch.testing.assert_close(runtime(x, x[:, :1]), model(x, x[:, :1]))
    with pytest.raises(QatkitError, match="the exported model expects x, scale, but x was passed"):
        runtime(x)
    with pytest.raises(QatkitError, match="OpenVINO fails on these inputs"):
        runtime(x[:, :2], x[:, :1])


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        (QuantSpec(8), None),
        (QuantSpec(4, strategy="group", group_size=16), None),
        (QuantSpec(3, symmetric=False), UINT8),
        (QuantSpec(7, strategy="tensor"), QuantSpec(8, strategy="tensor")),
        (QuantSpec(7), QuantSpec(4, symmetric=False, strategy="tensor")),
    ],
)
def test_other_quantization_is_exact_too(weight: QuantSpec, activation: QuantSpec | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, path = (
        nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)),
        torch.randn(64, 64),
        tmp_path / "m.xml",
    )
    prepare_qat(model, weight, activation)
    calibrate(model, [x])
    export_openvino(model.eval(), x, path)
    result = verify(model, path, [(x, torch.zeros(64).long())], threads=1)
    assert result.passed, result.failures
    user = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():  # the file itself says that inputs of layers are not quantized again
        torch.testing.assert_close(torch.from_numpy(user(x.numpy())[0]), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (QuantSpec(4), "i4"),
        (QuantSpec(3, symmetric=False, strategy="group", group_size=16), "u4"),
        (QuantSpec(5), "i8"),
    ],
)
def test_two_codes_of_a_weight_only_layer_share_a_byte_and_a_changed_one_is_found(
    weight: QuantSpec, kind: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x, path = nn.Sequential(nn.Linear(64, 33)), torch.randn(16, 64), tmp_path / "model.xml"
    prepare_qat(model, weight)
    export_openvino(model.eval(), x, path)
    data = re.search(
        r'name="0.weight.codes".*?<data element_type="(..)" .*?offset="(\d+)" size="(\d+)"', path.read_text(), re.S
    )
    assert data is not None
    assert (data[1], int(data[3])) == (kind, 64 * 33 // (1 if kind == "i8" else 2))
    batches = [(x, torch.zeros(16).long())]
    assert verify(model, path, batches, threads=1).passed
    stored = bytearray(path.with_suffix(".bin").read_bytes())
    stored[int(data[2])] ^= 1
    path.with_suffix(".bin").write_bytes(stored)
    failures = verify(model, path, batches, threads=1).failures
    assert any("layer '0': codes of the weight: 1 of 2112 differ, the first at [0, 0]" in each for each in failures)


def test_a_weight_of_zeros_has_4_bits_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, path = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(16, 8), tmp_path / "model.xml"
    nn.init.zeros_(model.get_parameter("0.weight"))
    prepare_qat(model, QuantSpec(4))
    export_openvino(model.eval(), x, path)
    result = verify(model, path, [(x, torch.zeros(16).long())], threads=1)
    assert result.passed, result.failures


def test_a_file_with_an_output_without_a_name_is_refused(tmp_path: Path) -> None:
    export_openvino(nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 8), tmp_path / "model.xml")
    model = openvino.Core().read_model(tmp_path / "model.xml")
    model.add_outputs([model.inputs[0]])
    openvino.save_model(model, tmp_path / "other.xml", compress_to_fp16=False)
    with pytest.raises(QatkitError, match="the model has 2 outputs, and names 1; export it with qatkit"):
        load_openvino(tmp_path / "other.xml")


class Pooled(nn.Module):
    """A reduction between two linear layers, the first without a bias."""

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.reduce = nn.Linear(16, 16, bias=False), nn.Linear(16, 3), reduce

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.reduce(self.first(x)))
        return logits


class Recurrent(nn.Module):
    """A recurrent layer whose last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.last = nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.cells(x)[0][:, -1])
        return logits


def quantized_and_verified(model: nn.Module, x: Tensor, path: Path) -> None:
    calibrate(model, [x])
    export_openvino(model.eval(), x, path, target="openvino")
    result = verify(model, path, [(x, torch.zeros(len(x)).long())], threads=1)
    assert result.passed, result.failures


@pytest.mark.parametrize("reduce", [lambda y: y.mean(1), lambda y: y.sum(1) / 5, lambda y: y.amax(1)])
def test_a_quantizer_after_a_reduction_has_the_right_scales(reduce: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Pooled(reduce).eval(), torch.randn(32, 5, 16)
    prepare_for_target(model, "openvino", x)
    quantized_and_verified(model, x, tmp_path / "model.xml")


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Conv1d(4, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 2, 2, 2)], (4, 16)),
        ([nn.Conv2d(4, 8, 3, groups=4), nn.ReLU6(), nn.AvgPool2d(2), nn.Conv2d(8, 4, 1)], (4, 10, 10)),
    ],
)
def test_other_convolutions_run_in_integers(layers: list[nn.Module], shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*copy.deepcopy(layers), nn.Flatten()).eval(), torch.randn(32, *shape)
    prepare_for_target(model, "openvino", x)
    quantized_and_verified(model, x, tmp_path / "model.xml")
    # without VNNI, OpenVINO has no integer kernel for transposed convolutions
    floating = {"Deconvolution": 1} if saturates() and isinstance(layers[-1], nn.ConvTranspose1d) else {}
    assert openvino_kernels(tmp_path / "model.xml").floating == floating


def test_recurrent_layers_have_integer_weights_but_no_quantized_states(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Recurrent().eval(), torch.randn(32, 5, 16)
    weights = copy.deepcopy(model)
    prepare_qat(weights, QuantSpec(7))
    quantized_and_verified(weights, x, tmp_path / "model.xml")
    assert openvino_kernels(tmp_path / "model.xml").floating == {"RNNSeq": 1, "FullyConnected": 1}
    prepare_qat(model, QuantSpec(7), UINT8)
    with pytest.raises(QatkitError, match=r"layer 'cells': OpenVINO does not support quantized hidden states"):
        export_openvino(model, x, tmp_path / "model.xml")


def test_unsigned_weights_run_in_floating_point_and_a_warning_names_the_targets(tmp_path: Path) -> None:
    model, x, path = mlp(), images(16), tmp_path / "model.xml"
    prepare_qat(model, QuantSpec(8), UINT8)
    calibrate(model, [x])
    with pytest.warns(QatkitWarning, match=r"layer '1' and 1 more: .* Use target: openvino .* openvino-vnni for a"):
        export_openvino(model.eval(), x, path)
    assert openvino_kernels(path).floating == {"FullyConnected": 2}
    assert verify(model, path, [(x, torch.zeros(16).long())], threads=1).passed


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_measure_of_rounding_uses_the_arithmetic_of_the_runtime(symmetric: bool) -> None:
    """Every value in the middle between two codes, and every code, as OpenVINO's own FakeQuantize rounds it."""
    generator, float32 = np.random.default_rng(0), np.float32
    for _ in range(20):
        made = FakeQuantize(QuantSpec(8, symmetric=symmetric, strategy="tensor"), "activation", (1,))
        ends = torch.tensor([-generator.random(), generator.random()], dtype=torch.float32)
        calibrate(made, [ends])
        scale, zero_point = (float(value) for value in made.qparams(torch.empty(0)))
        first = -128 if symmetric else 0
        x = ((np.arange(511) / 2 + first - zero_point) * scale).astype(float32)
        low, high = (float32(code - zero_point) * float32(scale) for code in (first, first + 255))
        values = openvino.opset13.parameter([-1], float32)
        node = openvino.opset13.fake_quantize(values, low, high, float32(first), float32(first + 255), 256)
        compiled = openvino.Core().compile_model(
            openvino.Model([node], [values], ""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        codes = compiled(x)[0]
        expected = (torch.from_numpy(codes).double() - zero_point) * scale
        assert torch.equal(openvino_grid(torch.from_numpy(x).double(), made), expected)


def test_the_same_model_gives_the_same_files(tmp_path: Path) -> None:
    x = images(4)
    model = prepared(ResNet(), "openvino", x)
    for name in ("first.xml", "second.xml"):
        export_openvino(model, x, tmp_path / name, target="openvino")
    for suffix in (".xml", ".bin"):
        assert (tmp_path / f"first{suffix}").read_bytes() == (tmp_path / f"second{suffix}").read_bytes()
    assert str(tmp_path) not in (tmp_path / "first.xml").read_text()


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from qatkit.export.openvino.format import export_openvino

path, moment = Path(sys.argv[1]), sys.argv[2]
export_openvino(torch.nn.Linear(4, 2), torch.rand(2, 4), path)
if moment == "full disk":
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save = __import__("openvino").save_model
    def limited(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        save(*args, **kwargs)
    __import__("openvino").save_model = limited
    export_openvino(torch.nn.Linear(400, 200), torch.rand(2, 400), path)
replace, count = os.replace, int(moment)
def killed(*args):
    global count
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    count -= 1
    replace(*args)
os.replace = killed
export_openvino(torch.nn.Linear(400, 200), torch.rand(2, 400), path)
"""


@pytest.mark.medium
@pytest.mark.parametrize("moment", ["0", "1", "2", "full disk"])
def test_an_interrupted_export_leaves_no_file_with_the_weights_of_another(moment: str, tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), moment], capture_output=True, text=True)
    if moment == "full disk":
        assert f"the file cannot be written (basic_ios::clear: iostream error): '{path}'" in done.stderr
        assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.xml"]
        assert load_openvino(path)(torch.rand(2, 4)).shape == (2, 2)
        return
    assert done.returncode == -9
    if moment == "0":  # before the weights are replaced: when the intermediate graph is
        assert load_openvino(path)(torch.rand(2, 4)).shape == (2, 2)
    else:
        assert not path.exists()


@pytest.mark.medium
def test_a_recipe_is_trained_exported_verified_and_measured(tmp_path: Path) -> None:
    (tmp_path / "served.yaml").write_text(RECIPE)
    done = qatkit("run", "served.yaml", "--out", "run", "--quiet", cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "export" / "int7" / "openvino" / "model.bin").exists()
    done = qatkit("bench", "run", "--batch", "1", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert '"integer": {"Convolution": ' in done.out
    done = qatkit("bench", "run", "--against", "ptq", cwd=tmp_path)
    assert done.code == 2
    assert "--against: 'openvino' files have no baseline to compare with" in done.err


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("{format: openvino}", "{format: onnx}", "'onnx' is not the format of target 'openvino' in stage 'int7'"),
        ("target: openvino}", "target: onnxruntime}", "'openvino' is not the format of target 'onnxruntime'"),
        ("target: openvino", "target: openvin", "did you mean 'openvino'"),
        (
            "target: openvino}",
            "activation: {num_bits: 8, symmetric: false, strategy: tensor, dynamic: true}}",
            "OpenVINO runs dynamic activation quantization in floating point; set target: openvino",
        ),
        ("target: openvino}", "weight: {num_bits: 4, type: float}}", "OpenVINO models are converted from ONNX: layer"),
    ],
)
def test_mistakes_are_answered_by_validate(old: str, new: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "served.yaml").write_text(RECIPE.replace(old, new))
    done = qatkit("validate", "served.yaml", cwd=tmp_path)
    assert done.code == 2
    assert words in done.err


def test_other_files_are_refused(tmp_path: Path) -> None:
    model, x = nn.Linear(4, 2), torch.rand(2, 4)
    with pytest.raises(QatkitError, match=r"OpenVINO does not load '.onnx' files; use a path that ends in .xml"):
        export_openvino(model, x, tmp_path / "model.onnx")
    export_onnx(model, x, tmp_path / "model.onnx")
    with pytest.raises(QatkitError, match="the model does not name its outputs; export it with qatkit"):
        load_openvino(tmp_path / "model.onnx")
    (tmp_path / "model.xml").write_text("<net>")
    with pytest.raises(QatkitError, match="OpenVINO cannot read it"):
        load_openvino(tmp_path / "model.xml")
