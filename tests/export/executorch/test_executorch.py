"""ExecuTorch files hold the trained codes and scales, every changed one is found, and outputs are those of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qatkit import QatkitError, QuantSpec, calibrate, export_model, prepare_qat
from qatkit.export.executorch.content import Content, Value, decode
from qatkit.export.interface import InputError
from qatkit.export.verification import verify
from qatkit.models import llama, resnet
from qatkit.quantization import prepare_for_target
from qatkit.schemes import Scheme
from tests.cli.in_process import qatkit
from tests.test_docs import ROOT, blocks, write_named_blocks

pytest.importorskip("executorch", reason="requires pip install 'qatkit[executorch]'")
pytestmark = pytest.mark.slow

X = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 0.5
BATCHES = [(X, torch.zeros(8).long())]
Exported = tuple[nn.Module, Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A small convolutional network with 8-bit weights and calibrated 8-bit activations."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    prepare_for_target(model.eval(), "executorch", X)
    calibrate(model, [X])
    path = tmp_path_factory.mktemp("int8") / "model.pte"
    result = export_model(model, "executorch", path, BATCHES, target="executorch")
    assert result.passed, result.failures
    assert (result.mean_error, result.weights, result.layers) == (0.0, 4 * 9 + 16 * 3, 2)
    assert result.runtime.startswith("ExecuTorch 1.")
    return model, path


@pytest.fixture(scope="module")
def in_groups(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An MLP with 4-bit weights in groups and inputs quantized per token."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5, bias=False)).eval()
    x = torch.randn(6, 7, 64)
    prepare_for_target(model, "executorch-8da4w", x)
    model(x)
    path = tmp_path_factory.mktemp("8da4w") / "model.pte"
    batches = [(x, torch.zeros(6, 7, 5)), (x[:2] * 3, torch.zeros(2, 7, 5))]
    result = export_model(model, "executorch", path, batches, task="regression", target="executorch-8da4w")
    assert result.passed, result.failures
    assert result.max_error is not None
    assert result.max_error < 1e-4 * float(model(x).detach().abs().max())
    return model, path


def test_integer_layers_read_and_write_codes(exported: Exported) -> None:
    content = decode(exported[1].read_bytes())
    assert [layer.name for layer in content.layers] == ["0", "4"]
    assert {(each.input.dtype, each.weight.dtype, each.output.dtype) for each in content.layers} == {("int8",) * 3}
    assert [layer.bias.dtype for layer in content.layers if layer.bias is not None] == ["int32", "int32"]
    assert (content.inputs, content.outputs) == (["input"], [""])


def test_the_codes_are_the_formula(exported: Exported, in_groups: Exported) -> None:
    weight = exported[0].get_submodule("4").weight.detach().double()
    scale = (weight.abs().amax(1) / 127).float()
    stored = decode(exported[1].read_bytes()).layers[1].weight
    assert np.array_equal(stored.scales, scale.numpy())  # type: ignore[arg-type]
    assert np.array_equal(stored.array, (weight / scale.double().view(-1, 1)).round().numpy())
    weight = in_groups[0].get_submodule("0").weight.detach().view(32, 2, 32)
    scale = (weight.abs().amax(2) / 7).bfloat16().float()
    stored = decode(in_groups[1].read_bytes()).layers[0].weight
    assert (stored.dtype, stored.group_size) == ("int4", 32)
    assert np.array_equal(stored.scales, scale.reshape(-1).numpy())  # type: ignore[arg-type]
    codes = (weight.double() / scale.double().unsqueeze(2)).round().clamp(-8, 7)
    assert np.array_equal(stored.array, codes.view(32, 64).numpy())


def first_byte(value: Value) -> tuple[bytes, bytes]:
    return value.data, bytes([value.data[0] ^ 1]) + value.data[1:]


def swapped_rows(value: Value) -> tuple[bytes, bytes]:
    half = len(value.data) // value.shape[0]
    return value.data, value.data[-half:] + value.data[half:-half] + value.data[:half]


def next_scale(value: Value) -> tuple[bytes, bytes]:
    assert value.scales is not None
    changed = value.scales.copy()
    changed[-1] = np.nextafter(changed[-1], np.float32(1))
    return value.scales.tobytes(), changed.tobytes()


def next_group_scale(value: Value) -> tuple[bytes, bytes]:
    assert value.scales is not None
    stored = (value.scales.view(np.uint32) >> 16).astype(np.uint16)
    changed = stored.copy()
    changed[0] += 1
    return stored.tobytes(), changed.tobytes()


def no_zero_point(value: Value) -> tuple[bytes, bytes]:
    assert value.scales is not None
    scale, zero_point = value.scales.tobytes(), np.int32(value.zero_point).tobytes()
    return scale + zero_point, scale + np.int32(0).tobytes()


def changed(path: Path, old: bytes, new: bytes, folder: Path) -> Path:
    data = path.read_bytes()
    assert old != new
    assert old in data
    made = folder / "model.pte"
    made.write_bytes(data.replace(old, new))
    return made


@pytest.mark.parametrize(
    ("pick", "change", "said"),
    [
        (lambda content: content.layers[0].weight, first_byte, "layer '0': codes of the weight: 1 of 36 differ"),
        (lambda content: content.layers[1].weight, swapped_rows, "layer '4': codes of the weight: "),
        (lambda content: content.layers[0].weight, next_scale, "layer '0': scales of the weight: 1 of 4 differ"),
        (lambda content: content.layers[1].bias, first_byte, "layer '4': the bias: 1 of 3 codes represent a different"),
        (
            lambda content: content.layers[1].bias,
            next_scale,
            "layer '4': the bias's scale (weight scale x input scale)",
        ),
        (lambda content: content.layers[0].input, next_scale, "layer '0': scale of the input: 1 of 1 differ"),
        (lambda content: content.layers[0].input, no_zero_point, "layer '0': zero point of the input: 1 of 1 differ"),
        (lambda content: content.layers[1].output, next_scale, "which no quantizer of the model has"),
        (lambda content: content.layers[1].output, no_zero_point, "result '4.output': no activation has its scale"),
    ],
)
def test_every_changed_value_is_found_and_named(
    pick: Callable[[Content], Value],
    change: Callable[[Value], tuple[bytes, bytes]],
    said: str,
    exported: Exported,
    tmp_path: Path,
) -> None:
    old, new = change(pick(decode(exported[1].read_bytes())))
    result = verify(exported[0], changed(exported[1], old, new, tmp_path), BATCHES)
    assert not result.passed
    assert said in "\n".join(result.failures)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (first_byte, "layer '0': codes of the weight: 1 of 2048 differ, the first at [0, 0]"),
        (next_group_scale, "layer '0': scales of the weight: 1 of 64 differ, the first at [0]"),
    ],
)
def test_a_changed_group_is_found(
    change: Callable[[Value], tuple[bytes, bytes]], said: str, in_groups: Exported, tmp_path: Path
) -> None:
    old, new = change(decode(in_groups[1].read_bytes()).layers[0].weight)
    batches = [(torch.randn(6, 7, 64), torch.zeros(6, 7, 5))]
    result = verify(in_groups[0], changed(in_groups[1], old, new, tmp_path), batches, task="regression")
    assert said in "\n".join(result.failures)


def test_layers_with_exchanged_names_are_found(exported: Exported, tmp_path: Path) -> None:
    path = changed(exported[1], b': "0"', b': "1"', tmp_path)
    assert "layer '0': not in the file" in verify(exported[0], path, BATCHES).failures


def test_a_damaged_file_fails_with_a_reason(exported: Exported, tmp_path: Path) -> None:
    model, path = exported
    data = path.read_bytes()
    broken = tmp_path / "model.pte"
    for size in (0, 6, 100, len(data) // 2):
        broken.write_bytes(data[:size])
        (failure,) = verify(model, broken, BATCHES).failures
        assert failure.startswith("model.pte cannot be read: ")


def test_a_batch_larger_than_the_first_is_refused(exported: Exported) -> None:
    larger = torch.cat([X, X])
    with pytest.raises(
        InputError, match=r"input 'input' is \[16, 1, 4, 4\], but the file accepts at most \[8, 1, 4, 4"
    ):
        verify(exported[0], exported[1], [(larger, torch.zeros(16).long())])


class TwoOutputs(nn.Module):
    """Two inputs, and two outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        both = torch.relu(self.a(x)) + self.b(y)
        return {"sum": both, "softmax": both.softmax(-1)}


def test_several_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, y = TwoOutputs().eval(), torch.randn(9, 6), torch.randn(9, 6)
    prepare_for_target(model, "executorch", (x, y))
    calibrate(model, [(x, y)], forward=lambda batch: model(*batch))
    result = export_model(
        model, "executorch", tmp_path / "model.pte", [{"x": x, "y": y, "labels": torch.zeros(9, 8)}], task="regression",
        forward=lambda model, batch: model(batch["x"], batch["y"])["sum"],
    )  # fmt: skip
    assert result.passed, result.failures


def residual() -> tuple[nn.Module, Any]:
    model, x = resnet((8, 16)).eval(), torch.randn(9, 1, 8, 8)
    prepare_for_target(model, "executorch", x)
    calibrate(model, [x])
    return model, [(x, torch.zeros(9).long())]


def symmetric() -> tuple[nn.Module, Any]:
    model, x = (
        nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)).eval(),
        torch.randn(9, 2, 4, 4),
    )
    per_tensor = QuantSpec(4, strategy="tensor"), QuantSpec(8, strategy="tensor")
    prepare_for_target(model, "executorch", x, *per_tensor)
    calibrate(model, [x])
    return model, [(x, torch.zeros(9).long())]


class Concatenated(nn.Module):
    """Codes with different scales are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        both: Tensor = self.head(torch.cat([self.a(x), 3 * self.b(x)], 1).flatten(1))
        return both


def concatenated() -> tuple[nn.Module, Any]:
    model, x = Concatenated().eval(), torch.randn(9, 1, 4, 4)
    prepare_for_target(model, "executorch", x)
    calibrate(model, [x])
    return model, [(x, torch.zeros(9).long())]


def per_token() -> tuple[nn.Module, Any]:
    model, x = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 8), nn.Linear(8, 4)).eval(), torch.randn(6, 9)
    token = QuantSpec(8, symmetric=False, strategy="token")
    prepare_qat(model, QuantSpec(4), token, layers={"2": Scheme(QuantSpec(8), token)})
    model(x)
    return model, [(x, torch.zeros(6).long())]


def decoder() -> tuple[nn.Module, Any]:
    model = llama(vocab_size=64, hidden=64, layers=1, heads=2, kv_heads=1, intermediate=96).eval()
    ids = torch.randint(64, (3, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    prepare_for_target(model, "executorch-8da4w", batch)
    model(**batch)
    shorter = {key: value[:2, :5] for key, value in batch.items()}
    return model, [{**each, "labels": each["input_ids"]} for each in (batch, shorter)]


def approximated() -> tuple[nn.Module, Any]:
    """With an activation of which XNNPACK has only the exact form."""
    model, x = nn.Sequential(nn.Linear(32, 16), nn.GELU(approximate="tanh")).eval(), 4 * torch.randn(64, 32)
    prepare_qat(model, QuantSpec(8), QuantSpec(8, symmetric=False, strategy="token"))
    model(x)
    return model, [(x, torch.zeros(64).long())]


@pytest.mark.parametrize("built", [residual, symmetric, concatenated, per_token, decoder, approximated])
def test_executorch_computes_what_was_trained(built: Callable[[], tuple[nn.Module, Any]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = built()
    result = export_model(model, "executorch", tmp_path / "model.pte", batches)
    assert result.passed, result.failures
    if built in (residual, symmetric, concatenated):  # at most one step of the output
        with torch.no_grad():
            step = float(model(batches[0][0]).unique().diff().min())
        assert result.max_error is not None
        assert result.max_error <= 1.001 * step


def test_a_layer_that_xnnpack_would_compute_in_floating_point_is_named(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    prepare_for_target(model, "executorch", x)
    calibrate(model, [x])
    del model.get_submodule("0")._forward_hooks[next(iter(model.get_submodule("0")._forward_hooks))]
    with pytest.raises(QatkitError, match="layer '0': XNNPACK would compute it in floating point, because"):
        export_model(model, "executorch", tmp_path / "model.pte", [(x, torch.zeros(4).long())])
    assert not (tmp_path / "model.pte").exists()


def test_the_page_works(tmp_path: Path) -> None:
    page = ROOT / "docs" / "executorch.md"
    write_named_blocks(page, tmp_path)
    for command in "\n".join(blocks(page, "bash")).splitlines():
        assert qatkit(*command.split()[1:], cwd=tmp_path).code == 0, command
    rows = json.loads((tmp_path / "runs/phone/report.json").read_text())["rows"]
    assert [row["verification"]["passed"] for row in rows] == [True, True]
    assert "load_method" in (tmp_path / "runs/phone/export/int8/executorch/README.md").read_text()
