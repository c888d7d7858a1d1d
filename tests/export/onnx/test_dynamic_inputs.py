"""Encoders with one activation scale per batch and with integer embeddings, in a default ONNX Runtime session."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from qatkit import QatkitError, QuantSpec, Scheme, prepare_qat
from qatkit.export.onnx.format import export_onnx
from qatkit.export.onnx.runtime import integer_kernels, load_runtime
from qatkit.export.verification import Verification, verify
from qatkit.models import untrained_model
from qatkit.quantization import prepare_for_target

BATCH = QuantSpec(8, symmetric=False, strategy="tensor", dynamic=True)
SHAPE = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def text(tokens: int = 12, samples: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(200, (samples, tokens), generator=torch.Generator().manual_seed(tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def encoder(rows: QuantSpec | None = None, weight: QuantSpec | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = untrained_model("bert", "SequenceClassification", SHAPE, num_classes=3).eval()
    tables = {} if rows is None else {"include": ["*", "*_embeddings"], "layers": {"*_embeddings": Scheme(rows)}}
    prepare_for_target(model, "onnxruntime-dynamic", text(), weight=weight, **tables)
    return model


def exported(model: nn.Module, path: Path) -> nn.Module:
    export_onnx(model, text(), path)
    return model


def checked(model: nn.Module, path: Path) -> Verification:
    batches = [(text(tokens), torch.zeros(4, dtype=torch.long)) for tokens in (12, 30)]
    return verify(model, path, [{**inputs, "labels": labels} for inputs, labels in batches], task="classification")


def test_the_scale_of_a_batch_is_that_of_dynamicquantizelinear() -> None:
    """ONNX: y_scale = (max(0, max) - min(0, min)) / 255; x is rounded to even after the division."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    prepare_qat(model, QuantSpec(8), BATCH)
    fake_quant: Any = model[0].input_fake_quant
    x = torch.tensor([[-0.5, 0.25, 1.0, 2.05], [0.1, 0.0, -0.125, 1.3]])
    scale = np.float32(np.float32(2.05 + 0.5) / np.float32(255))
    zero = np.round(0.5 / scale)
    expected = (np.clip(np.round(x.numpy() / scale) + zero, 0, 255) - zero) * scale
    torch.testing.assert_close(fake_quant(x), torch.from_numpy(expected.astype(np.float32)), rtol=0, atol=0)
    only = fake_quant(x[1:])  # the scale belongs to the batch, so another batch has another one
    assert not torch.equal(only, fake_quant(x)[1:])


@pytest.mark.parametrize("rows", [None, QuantSpec(8), QuantSpec(4, symmetric=False), QuantSpec(8, strategy="tensor")])
def test_an_encoder_is_exact_and_all_its_layers_are_integer_kernels(rows: QuantSpec | None, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    result = checked(exported(encoder(rows), path), path)
    assert result.passed, result.summary()
    kernels = integer_kernels(path)
    assert sum(kernels.integer.values()) == 14
    assert optimized(path, tmp_path)["Add"] < 14, "ONNX Runtime adds the biases of all layers inside the products"
    assert set(kernels.floating) <= {"MatMul", "FusedMatMul"}  # queries x keys, and probabilities x values
    codes = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.name.endswith(".codes")}
    assert len(codes) == 14 + 3 * (rows is not None)
    assert {each.dtype.itemsize for each in codes.values()} == {1}


def optimized(path: Path, folder: Path) -> Counter[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize(
    "weight", [QuantSpec(8), QuantSpec(8, symmetric=False), QuantSpec(4, symmetric=False, strategy="tensor")]
)
def test_a_weight_with_zero_points_and_more_rows_than_are_decoded_at_once_is_exact(
    weight: QuantSpec, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, path = nn.Sequential(nn.Linear(1100, 3)).eval(), tmp_path / "model.onnx"
    x = torch.randn(8, 1100)
    prepare_qat(model, weight, BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 8-bit codes become unsigned
        export_onnx(model, x, path)
    result = verify(model, path, [(x, torch.zeros(8, 3))], task="regression")
    assert result.passed, result.summary()
    assert sum(integer_kernels(path).integer.values()) == 1


def test_zero_points_that_are_all_zero_are_in_the_file_and_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = nn.Sequential(nn.Linear(16, 4)).eval(), tmp_path / "model.onnx"
    model[0].weight.data.abs_()  # the smallest value is 0, and so is its code
    prepare_qat(model, QuantSpec(7, symmetric=False), BATCH)
    x = torch.randn(8, 16)
    export_onnx(model, x, path)
    assert verify(model, path, [(x, torch.zeros(8, 4))], task="regression").failures == []


def test_a_file_with_integer_embeddings_has_the_size_of_its_codes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20000, 32)).eval()
    prepare_qat(model, QuantSpec(8), include=["0"])
    path = tmp_path / "model.onnx"
    export_onnx(model, torch.randint(20000, (2, 10)), path)
    assert path.stat().st_size < 20000 * (32 + 4) + 2000
    ids = torch.arange(20000).view(-1, 10)
    assert torch.equal(load_runtime(path)(ids), model(ids))


def damaged(path: Path, change: Callable[[Any], None]) -> None:
    proto = onnx.load(path)
    change(proto.graph)
    onnx.save(proto, path)


def flip(name: str, value: float) -> Callable[[Any], None]:
    def change(graph: Any) -> None:
        tensor = next(t for t in graph.initializer if t.name.endswith(name))
        array = numpy_helper.to_array(tensor).copy()
        array.flat[5] += np.asarray(value, array.dtype)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return change


def products(graph: Any) -> list[Any]:
    return [node for node in graph.node if node.op_type == "MatMulInteger"]


def read_another_zero_point(graph: Any) -> None:
    """Let one product subtract the zero point of another layer's input."""
    first, *others = products(graph)
    first.input[2] = next(node.input[2] for node in others if node.input[2] != first.input[2])


def scale_with_another_weight(graph: Any) -> None:
    """Let one product use the scales of another layer's weight."""
    scales = [node for node in graph.node if node.op_type == "Mul" and node.input[1].endswith("weight.scale")]
    scales[0].input[1] = scales[1].input[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip("word_embeddings.weight.codes", 1), "word_embeddings': codes of the weight: 1 of 6400 differ"),
        (flip("word_embeddings.weight.scale", 0.5), "word_embeddings': scales of the weight: 1 of 200 differ"),
        (flip("word_embeddings.weight.zero_point", 1), "word_embeddings': zero points of the weight: 1 of 200 differ"),
        (flip("query.weight.codes", 1), "query': codes of the weight: 1 of 1024 differ"),
        (flip("query.weight.zero_point", 1), "query': zero points of the weight: 1 of 32 differ"),
        (flip("query.bias", 1), "query': the bias: 1 of 32 differ"),
        (read_another_zero_point, "input: no DynamicQuantizeLinear node quantizes it"),
        (scale_with_another_weight, "no node decodes the codes with their scale and zero point"),
    ],
)
def test_verify_names_what_was_changed(change: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = exported(encoder(QuantSpec(7, symmetric=False), QuantSpec(7, symmetric=False)), path)
    damaged(path, change)
    result = checked(model, path)
    assert not result.passed
    assert message in result.summary()


@pytest.mark.parametrize(
    ("layer", "scheme", "message"),
    [
        (nn.Linear(8, 8), Scheme(QuantSpec(8), QuantSpec(8, strategy="tensor", dynamic=True)), "dynamic: true"),
        (nn.Linear(8, 8), Scheme(QuantSpec(8), QuantSpec(8, strategy="token")), "strategy: tensor, dynamic: true"),
        (nn.Linear(32, 8), Scheme(QuantSpec(4, strategy="group", group_size=16), BATCH), "weights in groups of 16"),
        (nn.Conv2d(1, 2, 3), Scheme(QuantSpec(8), BATCH), "Conv2d with dynamic activations in floating point"),
        (nn.Embedding(8, 4), Scheme(QuantSpec(8, strategy="group", group_size=2)), "with groups of 2"),
        (nn.Embedding(8, 4, max_norm=1.0), Scheme(QuantSpec(8)), "max_norm=1.0"),
    ],
)
def test_what_the_runtime_cannot_hold_is_refused_before_training(
    layer: nn.Module, scheme: Scheme, message: str
) -> None:
    from qatkit.export.formats import FORMATS

    with pytest.raises(QatkitError, match="layer '0'") as error:
        FORMATS["onnx"].check_model(nn.Sequential(layer), {"0": scheme})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantSpec(8, strategy="tensor", observer="mse", dynamic=True), "'mse' is not supported with dynamic"),
        (lambda: QuantSpec(8, dynamic="yes"), "'yes' is not a boolean"),
        (lambda: Scheme(QuantSpec(8, strategy="tensor", dynamic=True)), "only for activations"),
    ],
)
def test_a_contradictory_spec_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        make()


def test_the_kv_cache_has_no_scale_per_batch() -> None:
    from qatkit.schemes import check_kv_cache

    with pytest.raises(QatkitError, match=r"kv_cache\.dynamic: true is not supported for the KV cache"):
        check_kv_cache(BATCH)


def test_rows_that_are_always_the_same_keep_their_names(tmp_path: Path) -> None:
    """Constant positions: the optimizer must not fold the table into a float constant."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(6, 8), nn.Linear(8, 2)
            self.register_buffer("order", torch.arange(6))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(x + self.table(self.order))
            return out

    model, x = Positions().eval(), torch.randn(3, 6, 8)
    prepare_qat(model, QuantSpec(8), include=["table"])
    path = tmp_path / "model.onnx"
    export_onnx(model, x, path)
    result = verify(model, path, [(x, torch.zeros(3, 6, 2))], task="regression")
    assert result.passed, result.summary()
