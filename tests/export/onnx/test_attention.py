"""`nn.MultiheadAttention` and torch's transformer layers in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatkit import QatkitError, QuantSpec, calibrate, prepare_qat
from qatkit.export.onnx.format import export_onnx
from qatkit.export.onnx.runtime import integer_kernels, load_runtime
from qatkit.export.verification import verify
from qatkit.quantization import prepare_for_target
from tests.export.conftest import UINT8
from tests.export.files import change_constant, constants, first_changed

DYNAMIC = QuantSpec(8, symmetric=False, strategy="tensor", dynamic=True)


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool = True, **arguments: Any) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.attn = nn.MultiheadAttention(16, 4, **arguments)

    def forward(self, x: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Any:
        out = self.attn(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=self.need_weights)
        return out if self.need_weights else out[0]


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, kdim=8, vdim=12, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = self.attn(query, key, value)[0]
        return out


def quantized(
    model: nn.Module, weight: QuantSpec, activation: QuantSpec | None, inputs: dict[str, Tensor]
) -> nn.Module:
    prepare_qat(model.eval(), weight, activation)
    if activation is not None:
        calibrate(model, [inputs], forward=lambda batch: model(**batch))
    return model


def failures(model: nn.Module, inputs: dict[str, Tensor], path: Path) -> list[str]:
    """What verification finds, over the first output."""

    def forward(either: Any, batch: Any) -> Tensor:
        return first(either(**batch[0]))

    batch = (inputs, torch.zeros_like(first(model(**inputs))))
    return verify(model, path, [batch], threads=1, task="regression", forward=forward).failures


def first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def differences(model: nn.Module, inputs: dict[str, Tensor], path: Path) -> list[float]:
    with torch.no_grad():
        pairs = zip(tensors(model(**inputs)), tensors(load_runtime(path, 1)(**inputs)), strict=True)
    return [float((ours - theirs).abs().max()) for ours, theirs in pairs]


def tensors(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def lengths(size: int, *each: int) -> Tensor:
    """A padding mask ``[batch, size]``: True beyond each length."""
    return torch.arange(size) >= torch.tensor(each)[:, None]


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(3, 7, 16)


@pytest.mark.parametrize(
    ("weight", "activation", "integer"),
    [
        (QuantSpec(7), UINT8, {"MatMulIntegerToFloat": 4}),
        (QuantSpec(7), DYNAMIC, {"MatMulIntegerToFloat": 3, "DynamicQuantizeMatMul": 1}),
        (QuantSpec(4, strategy="group", group_size=8), None, {}),
    ],
    ids=["static", "dynamic", "weight-only"],
)
def test_the_four_projections_compute_what_training_computed(
    weight: QuantSpec, activation: QuantSpec | None, integer: dict[str, int], x: Tensor, tmp_path: Path
) -> None:
    path, model = tmp_path / "model.onnx", quantized(SelfAttention(batch_first=True), weight, activation, {"x": x})
    export_onnx(model, {"x": x}, path)
    assert failures(model, {"x": torch.cat([x, x[:1]])}, path) == []
    assert max(differences(model, {"x": x}, path)) < 1e-6
    assert integer_kernels(path).integer == integer
    names = {name for name in constants(path) if name.endswith(".codes") and "weight" in name}
    assert names == {f"attn.{part}.weight.codes" for part in ("q_proj", "k_proj", "v_proj", "out_proj")}


def test_a_plain_attention_layer_with_the_decoded_weights_of_the_file_computes_the_same(
    x: Tensor, tmp_path: Path
) -> None:
    path, model = tmp_path / "model.onnx", quantized(SelfAttention(), QuantSpec(5), None, {"x": x})
    export_onnx(model, {"x": x}, path)
    file, plain = constants(path), nn.MultiheadAttention(16, 4)

    def decoded(part: str) -> Tensor:
        codes, scale = (torch.tensor(file[f"attn.{part}.weight.{key}"]) for key in ("codes", "scale"))
        return codes.float() * scale.view(-1, 1)

    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([decoded(f"{name}_proj") for name in "qkv"]))
        plain.out_proj.weight.copy_(decoded("out_proj"))
        plain.in_proj_bias.copy_(torch.cat([torch.tensor(file[f"attn.{name}_proj.bias"]) for name in "qkv"]))
        expected = plain(x, x, x)
    for ours, theirs in zip(load_runtime(path, 1)(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        ({"batch_first": True}, {"mask": torch.ones(7, 7).triu(1).bool()}),
        ({"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}, {"padding": lengths(7, 6, 4, 3)}),
        ({"batch_first": True, "bias": False, "need_weights": False}, {"padding": lengths(7, 6, 4, 3).float() * -9}),
    ],
    ids=["mask", "padding and added keys", "float padding without biases"],
)
@pytest.mark.filterwarnings("ignore:the batch of the example is 3, so the first dimension of 'mask'")
@pytest.mark.filterwarnings("ignore:the exported file fixes sequence")  # as the mask does
def test_masks_are_inputs_of_the_file(
    arguments: dict[str, Any], extra: dict[str, Tensor], x: Tensor, tmp_path: Path
) -> None:
    inputs = {"x": x, **extra}
    path, model = tmp_path / "model.onnx", quantized(SelfAttention(**arguments), QuantSpec(7), UINT8, inputs)
    export_onnx(model, inputs, path)
    assert failures(model, inputs, path) == []
    assert max(differences(model, inputs, path)) < 1e-6


def test_keys_and_values_may_have_their_own_widths(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = {"query": torch.rand(2, 4, 16), "key": torch.rand(2, 5, 8), "value": torch.rand(2, 5, 12)}
    path, model = tmp_path / "model.onnx", quantized(CrossAttention(), QuantSpec(7), UINT8, inputs)
    export_onnx(model, inputs, path)
    assert constants(path)["attn.k_proj.weight.codes"].shape == (16, 8)
    assert failures(model, inputs, path) == []
    assert max(differences(model, inputs, path)) < 1e-6


class Tagger(nn.Module):
    """torch's transformer encoder over token IDs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
        self.head = nn.Linear(16, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        out: Tensor = self.head(hidden)
        return out


def test_a_transformer_encoder_runs_with_other_lengths_than_the_example(tmp_path: Path) -> None:
    torch.manual_seed(0)
    texts = {"input_ids": torch.randint(50, (3, 7)), "attention_mask": (~lengths(7, 7, 4, 3)).long()}
    path, model = tmp_path / "model.onnx", quantized(Tagger(), QuantSpec(7), UINT8, texts)
    export_onnx(model, texts, path, "token_classification")
    longer = {"input_ids": torch.randint(50, (5, 12)), "attention_mask": (~lengths(12, 12, 4, 3, 9, 1)).long()}
    assert failures(model, longer, path) == []
    assert max(differences(model, longer, path)) < 1e-6
    assert integer_kernels(path).integer == {"MatMulIntegerToFloat": 13}


def test_a_target_quantizes_the_projections_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    texts = {"input_ids": torch.randint(50, (3, 7)), "attention_mask": torch.ones(3, 7).long()}
    model = Tagger().eval()
    prepare_for_target(model, "onnxruntime", texts)
    calibrate(model, [texts], forward=lambda batch: model(**batch))
    export_onnx(model, texts, tmp_path / "model.onnx")
    assert failures(model, texts, tmp_path / "model.onnx") == []
    assert integer_kernels(tmp_path / "model.onnx").integer == {"MatMulIntegerToFloat": 13}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("attn.k_proj.weight.codes", "layer 'attn.k_proj': codes of the weight: 1 of 256 differ"),
        ("attn.v_proj.weight.scale", "layer 'attn.v_proj': scales of the weight: 1 of 16 differ"),
        ("attn.q_proj.input.scale", "layer 'attn.q_proj': input: scale: 1 of 1 differ"),
        ("attn.v_proj.bias.codes", "layer 'attn.v_proj': the bias: 1 of 16 codes represent a different value"),
    ],
)
def test_a_changed_part_is_named(name: str, message: str, x: Tensor, tmp_path: Path) -> None:
    path, model = tmp_path / "model.onnx", quantized(SelfAttention(), QuantSpec(4), UINT8, {"x": x})
    export_onnx(model, {"x": x}, path)
    change_constant(path, name, first_changed if "scale" in name else add_one)
    assert any(failure.startswith(message) for failure in failures(model, {"x": x}, path))


def add_one(values: Any) -> None:
    values.flat[0] += 1 if values.flat[0] < 7 else -1


def test_a_quantized_output_projection_alone_is_exported(x: Tensor, tmp_path: Path) -> None:
    path, model = tmp_path / "model.onnx", SelfAttention(need_weights=False).eval()
    prepare_qat(model, QuantSpec(4), include=["attn.out_proj"])
    export_onnx(model, {"x": x}, path)
    assert failures(model, {"x": x}, path) == []
    assert max(differences(model, {"x": x}, path)) < 1e-6


def test_an_attention_layer_that_was_not_calibrated_is_refused(x: Tensor, tmp_path: Path) -> None:
    model = SelfAttention()
    prepare_qat(model, QuantSpec(8), UINT8, exclude=["attn.out_proj"])
    with pytest.raises(QatkitError, match=r"layer 'attn\.q_proj': the activation scale was never set"):
        export_onnx(model, {"x": x}, tmp_path / "model.onnx")
