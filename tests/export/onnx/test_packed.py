"""Weight-only layers of 4 bits and fewer: exact in ONNX Runtime, packed in the file, and compared code by code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from qatkit import QatkitError, QuantSpec, prepare_qat
from qatkit.export.onnx.format import export_onnx
from qatkit.export.onnx.runtime import integer_kernels, load_runtime
from qatkit.export.verification import Verification, verify
from qatkit.models import untrained_model

Array = np.ndarray[Any, Any]


def grouped(bits: int, size: int, **others: Any) -> QuantSpec:
    return QuantSpec(bits, strategy="group", group_size=size, **others)


SPECS = {
    "int4 in groups of 16": grouped(4, 16),
    "uint4 in groups of 16": grouped(4, 16, symmetric=False),
    "int4 in groups of 32": grouped(4, 32),
    "int4 in one group": grouped(4, 96),
    "int4": QuantSpec(4),
    "uint4": QuantSpec(4, symmetric=False),
    "uint4 per tensor": QuantSpec(4, symmetric=False, strategy="tensor"),
    "int3": QuantSpec(3),
    "uint3": QuantSpec(3, symmetric=False),
    "int2 in groups of 32": grouped(2, 32),
    "learned uint2": QuantSpec(2, symmetric=False, observer="lsq_plus"),
    "negative scales": QuantSpec(4, scale_rule="signed", scale_dtype="float16"),
}


class Two(nn.Module):
    """Linear layers; the inputs of the second fill no block of any size."""

    def __init__(self, inner: int = 88) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(96, inner), nn.Linear(inner, 25, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(x)))
        return out


def exported(spec: QuantSpec, path: Path) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Two(96 if spec.strategy == "group" else 88).eval(), torch.randn(36, 96)
    prepare_qat(model, spec)
    export_onnx(model, x, path)
    return model, x


def checked(model: nn.Module, x: Tensor, path: Path) -> Verification:
    return verify(model, path, [(x, torch.zeros(36, 25))], task="regression")


def in_float64(layer: Any) -> Array:
    """The weight by the definition, with numpy."""
    spec = layer.weight_fake_quant.spec
    weight = layer.weight.detach().numpy()
    scale, zero = (part.detach().numpy() for part in layer.weight_fake_quant.qparams(layer.weight))
    columns = weight.shape[1] if spec.strategy != "tensor" else weight.size
    scale, zero = (np.repeat(part, columns // part.shape[-1]).reshape(-1, weight.shape[1]) for part in (scale, zero))
    codes = np.clip(np.round(weight / scale) + zero, spec.qmin, spec.qmax)
    return (codes.astype(np.float64) - zero) * scale


def reference(model: Any, x: Tensor) -> Array:
    hidden = np.maximum(x.double().numpy() @ in_float64(model.up).T + model.up.bias.detach().double().numpy(), 0)
    return hidden @ in_float64(model.down).T


@pytest.mark.parametrize("name", SPECS)
def test_products_are_those_of_the_trained_weights_in_float64(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model, x = exported(SPECS[name], path)
    assert integer_kernels(path).weight_only == {"MatMulNBits": 2}
    expected = reference(model, x)
    runtime = load_runtime(path, 1)
    for rows in (x, x[:1]):  # a single row takes another kernel
        difference = np.abs(runtime(rows).numpy() - expected[: len(rows)]).mean()
        assert difference < 1e-6 * np.abs(expected).mean()
    result = checked(model, x, path)
    assert result.passed, result.failures


CHANGES = {
    "a code": ("codes", "codes of the weight: 1 of 9216 differ, the first at [1, 1]"),
    "a scale": ("scale", "scales of the weight: 1 of 288 differ, the first at [0, 2]"),
    "a zero point": ("zero_point", "zero points of the weight: 1 of 288 differ, the first at [0, 2]"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_changed_constant_is_named(change: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model, x = exported(grouped(4, 32, symmetric=False), path)
    part, message = CHANGES[change]
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if t.name == f"up.weight.{part}")
    values = numpy_helper.to_array(tensor).copy()
    if part == "codes":
        values[1, 0, 0] ^= 1 << 4  # the high nibble: input 1 of output 1
    elif part == "scale":
        values[0, 2] *= 1.0001
    else:
        values[0, 1] ^= 1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, path)
    failures = checked(model, x, path).failures
    assert f"layer 'up': {message}" in "\n".join(failures)
    assert any("weights as the runtime decodes them" in failure for failure in failures)


@pytest.mark.parametrize(("at", "name"), [(4, "order"), (5, "")])
def test_another_order_of_inputs_or_bias_is_named(at: int, name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model, x = exported(grouped(4, 32), path)
    proto = onnx.load(path)
    node = next(node for node in proto.graph.node if "up.weight.codes" in node.input)
    node.input[at] = name
    proto.graph.initializer.append(numpy_helper.from_array(np.arange(96, dtype=np.int32), "order"))
    onnx.save(proto, path)
    expected = {4: "'order' and the bias 'up.bias'", 5: "'' and the bias ''"}[at]
    message = f"layer 'up': its node has the input order {expected} instead of '' and 'up.bias'"
    assert message in checked(model, x, path).failures


def test_codes_take_four_bits_and_a_scale_per_group(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    exported(grouped(4, 32), path)
    constants = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    weights = sum(value.nbytes for name, value in constants.items() if ".weight." in name)
    assert weights * 8 == (96 * 96 + 96 * 25) * (4 + 32 / 32)


UNPACKED = {
    "int8 in groups of 32": (grouped(8, 32), 1),
    "uint8 in groups of 32": (grouped(8, 32, symmetric=False), 1),
    "uint8": (QuantSpec(8, symmetric=False), 1),
    "int5 per tensor": (QuantSpec(5, strategy="tensor"), 1),
    "int4 in groups of 24": (grouped(4, 24), 0.5),
    "uint4 in groups of 24": (grouped(4, 24, symmetric=False), 0.5),
}


@pytest.mark.parametrize("name", UNPACKED)
def test_other_weights_are_decoded_once_and_exact(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    spec, bytes_per_code = UNPACKED[name]
    model, x = exported(spec, path)
    assert not nodes(path, "DequantizeLinear"), "ONNX Runtime would decode in every call"
    assert integer_kernels(path).weight_only == {}
    codes = {t.name: t for t in onnx.load(path).graph.initializer}["up.weight.codes"]
    assert len(codes.raw_data) == 96 * model.up.out_features * bytes_per_code
    expected = reference(model, x)
    assert np.abs(load_runtime(path)(x).numpy() - expected).mean() < 1e-6 * np.abs(expected).mean()
    result = checked(model, x, path)
    assert result.passed, result.failures


@pytest.mark.parametrize(
    "spec", [QuantSpec(4), QuantSpec(4, symmetric=False), QuantSpec(2, strategy="tensor")], ids=str
)
def test_convolutions_of_four_bits_take_four_bits(spec: QuantSpec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)).eval(), torch.rand(4, 3, 8, 8)
    prepare_qat(model, spec)
    path = tmp_path / "model.onnx"
    export_onnx(model, x, path)
    assert {len(t.raw_data) for t in onnx.load(path).graph.initializer if t.name.endswith("codes")} == {108, 180}
    result = verify(model, path, [(x, torch.zeros(4, 5, 4, 4))], task="regression")
    assert result.passed, result.failures
    assert result.max_error is not None
    assert result.max_error < 1e-6


def nodes(path: Path, kind: str) -> list[Any]:
    return [node for node in onnx.load(path).graph.node if node.op_type == kind]


TABLES = {
    "int4": (QuantSpec(4), 4 + 32 / 48),
    "uint4": (QuantSpec(4, symmetric=False), 4 + 40 / 48),
    "int2": (QuantSpec(2), 2 + 32 / 48),
    "uint3 per tensor": (QuantSpec(3, symmetric=False, strategy="tensor"), 4 + 40 / 48),
    "int4 in groups of 16": (grouped(4, 16), 4 + 32 / 16),
    "uint4 in groups of 16": (grouped(4, 16, symmetric=False), 4 + 112 / 48),
    "int8 in groups of 16": (grouped(8, 16), 8 + 32 / 16),
    "uint8 in groups of 48": (grouped(8, 48, symmetric=False), 8 + 40 / 48),
}


def embedded(spec: QuantSpec, path: Path) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(50, 48)).eval(), torch.randint(50, (3, 5))
    prepare_qat(model, spec, include=["0"])
    export_onnx(model, ids, path)
    return model, ids


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_embeddings_are_exact_and_small(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    spec, bits = TABLES[name]
    model, ids = embedded(spec, path)
    assert len(nodes(path, "GatherBlockQuantized")) == 1
    rows = in_float64(model[0]).astype(np.float32)
    assert (load_runtime(path, 1)(ids).numpy() == rows[ids.numpy()]).all()
    constants = [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    assert sum(value.nbytes for value in constants) * 8 == pytest.approx(50 * 48 * bits)
    result = verify(model, path, [(ids, torch.zeros(3, 5, 48))], task="regression")
    assert result.passed, result.failures
    assert result.max_error == 0


def test_a_changed_code_of_an_embedding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model, ids = embedded(QuantSpec(4), path)
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if t.name == "0.weight.codes")
    values = numpy_helper.to_array(tensor).copy()
    values[49, 23] ^= 1 << 4
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, path)
    failures = verify(model, path, [(ids, torch.zeros(3, 5, 48))], task="regression").failures
    assert any("layer '0': codes of the weight: 1 of 2400 differ, the first at [49, 47]" in each for each in failures)


def test_groups_of_embeddings_that_fill_no_block_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QatkitError, match=r"layer '0': ONNX export does not support Embedding with groups of 24"):
        embedded(grouped(4, 24), tmp_path / "model.onnx")


SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "Model", SIZES),
    "llama": ("llama", "CausalLM", {**SIZES, "num_key_value_heads": 1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_language_models_run_with_any_batch_and_length(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    family, head, shape = MODELS[name]
    model = untrained_model(family, head, shape).eval()
    layers = len(prepare_qat(model, grouped(4, 32)))
    ids = torch.randint(100, (2, 6))
    path = tmp_path / "model.onnx"
    export_onnx(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, path)
    assert integer_kernels(path).weight_only == {"MatMulNBits": layers}
    longer = torch.randint(100, (3, 17))
    inputs = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    with torch.no_grad():
        expected = next(iter(model(**inputs).values()))
    computed = next(iter(load_runtime(path, 1)(**inputs).values()))
    torch.testing.assert_close(computed, expected, atol=1e-5, rtol=1e-5)
