"""LSTMs whose inputs and hidden states have one scale per batch: ONNX Runtime's DynamicQuantizeLSTM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qatkit import QatkitError, QatkitWarning, QuantSpec, Scheme
from qatkit.export.formats import FORMATS
from qatkit.export.onnx.baselines import quantize as quantize_free
from qatkit.export.onnx.format import export_onnx
from qatkit.export.onnx.runtime import integer_kernels, load_runtime
from qatkit.export.verification import Verification, verify
from tests.export.files import Array, change_constant, constants, first_changed
from tests.export.onnx.test_recurrent import quantized, sequences_apart, tensors

BATCH = QuantSpec(8, symmetric=False, strategy="tensor", dynamic=True)
pytestmark = pytest.mark.filterwarnings("ignore:.*with several threads, ONNX Runtime splits a batch")


def checked(model: nn.Module, path: Path, lengths: tuple[int, ...] = (6, 11)) -> Verification:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(256, time, 8, generator=generator) for time in lengths]
    batches = [(x, torch.zeros(*x.shape[:2], 3)) for x in inputs]
    return verify(model, path, batches, task="regression", forward=lambda m, batch: m(batch[0])[0])


@pytest.mark.parametrize(
    ("weight", "options"),
    [
        (QuantSpec(7), {"bidirectional": True, "num_layers": 2}),
        (QuantSpec(8, strategy="tensor"), {"bias": False}),
        (QuantSpec(4, symmetric=False, strategy="tensor"), {}),
    ],
)
def test_outputs_and_states_are_the_trained_ones_for_every_length(
    weight: QuantSpec, options: dict[str, Any], tmp_path: Path
) -> None:
    path, (model, x) = tmp_path / "model.onnx", quantized(nn.LSTM, weight, BATCH, **options)
    target = "onnxruntime-vnni" if weight.num_bits == 8 and not options.get("bias", True) else None
    export_onnx(model, {"x": x}, path, "token_classification", target)
    result = checked(model, path)
    if not any("saturate" in failure for failure in result.failures):  # signed 8 bits without VNNI
        assert result.passed, result.summary()
        assert "computed by ONNX Runtime with one thread" in result.summary()
    assert sequences_apart(model, torch.randn(1, 6, 8), path) == 0
    runs = (1 + model.rnn.bidirectional) * model.rnn.num_layers
    kernels = integer_kernels(path)
    assert kernels.integer["DynamicQuantizeLSTM"] == runs
    assert sum(kernels.integer.values()) == runs + 1
    assert not kernels.floating
    codes = [values for name, values in constants(path).items() if name.endswith("weight.codes")]
    assert len(codes) == 2 * runs + 1
    assert {each.dtype.itemsize for each in codes} == {1}


def test_an_lstm_in_float64_from_the_constants_of_the_file_computes_the_same(tmp_path: Path) -> None:
    path, (model, x) = tmp_path / "model.onnx", quantized(nn.LSTM, QuantSpec(7), BATCH)
    export_onnx(model, x, path)
    file = {name: values.astype(np.float64) for name, values in constants(path).items()}

    def rounded(values: Array) -> Array:
        low, high = min(values.min(), 0), max(values.max(), 0)
        scale = (high - low) / 255
        zero = np.round(-low / scale)
        return (np.clip(np.round(values / scale) + zero, 0, 255) - zero) * scale

    def product(values: Array, part: str) -> Array:
        weight = file[f"rnn.weight_{part}_l0.weight.codes"] * file[f"rnn.weight_{part}_l0.weight.scale"][:, None]
        return values @ weight.T + file[f"rnn.bias_{part}_l0"]

    def sigmoid(values: Array) -> Array:
        return 1 / (1 + np.exp(-values))

    whole = rounded(x.double().numpy())  # one scale for all steps
    h, c = np.zeros((4, 12)), np.zeros((4, 12))
    for time in range(6):
        hidden = rounded(h) if h.any() else h
        i, f, g, o = np.split(product(whole[:, time], "ih") + product(hidden, "hh"), 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    final, cell = tensors(load_runtime(path, 1)(x))[1:]
    np.testing.assert_allclose(final[0].numpy(), h, atol=1e-5)
    np.testing.assert_allclose(cell[0].numpy(), c, atol=1e-5)


def test_quantize_dynamic_uses_the_same_operator_and_as_many_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LSTM(64, 128)).eval(), torch.randn(5, 2, 64)
    export_onnx(model, x, tmp_path / "float.onnx")
    quantize_free("quantize_dynamic", tmp_path / "float.onnx", [x], tmp_path / "free.onnx")
    prepared, _ = quantized(nn.LSTM, QuantSpec(7, strategy="tensor"), BATCH)
    export_onnx(prepared, torch.randn(4, 6, 8), tmp_path / "model.onnx")
    kinds = [{node.op_type for node in onnx.load(tmp_path / name).graph.node} for name in ("free.onnx", "model.onnx")]
    assert all("DynamicQuantizeLSTM" in each for each in kinds)


def test_the_warning_says_how_results_depend_on_threads(tmp_path: Path) -> None:
    path, (model, x) = tmp_path / "model.onnx", quantized(nn.LSTM, QuantSpec(7), BATCH)
    with pytest.warns(QatkitWarning, match=r"layer 'rnn': with several threads, .* .intra_op_num_threads = 1"):
        export_onnx(model, x, path)
    batch = torch.randn(16, 6, 8)
    one, two = (tensors(load_runtime(path, threads)(batch))[1] for threads in (1, 2))
    assert not torch.equal(one, two), "if this holds, the warning is wrong"
    halves = torch.cat([tensors(load_runtime(path, 1)(half))[1] for half in batch.split(8)], 1)
    assert not torch.equal(one, halves)


def swap_gates(graph: Any) -> None:
    gates = next(n for n in graph.node if n.op_type == "Split" and n.input[0].endswith("weight.codes"))
    node = next(node for node in graph.node if node.op_type == "Concat" and gates.output[0] in node.input)
    first, second = node.input[:2]
    node.input[0], node.input[1] = second, first


def read_the_other_scale(graph: Any) -> None:
    node = next(node for node in graph.node if node.op_type == "DynamicQuantizeLSTM")
    node.input[8] = node.input[10]


def constant(name: str) -> Callable[[Path], None]:
    return lambda path: change_constant(path, name, first_changed)


def nodes(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        proto = onnx.load(path)
        change(proto.graph)
        onnx.save(proto, path)

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (constant("rnn.weight_ih_l0.weight.codes"), "layer 'rnn.weight_ih_l0': codes of the weight: 1 of 384 differ"),
        (constant("rnn.weight_hh_l0.weight.scale"), "layer 'rnn.weight_hh_l0': scales of the weight: 1 of 48 differ"),
        (constant("rnn.bias_hh_l0"), "layer 'rnn': bias_hh_l0: 1 of 48 differ"),
        (nodes(swap_gates), "weights as the runtime decodes them"),
        (nodes(read_the_other_scale), "layer 'rnn.weight_ih_l0': no node decodes the codes with their scale"),
    ],
)
def test_a_changed_part_is_named(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path, (model, x) = tmp_path / "model.onnx", quantized(nn.LSTM, QuantSpec(7), BATCH)
    export_onnx(model, x, path)
    change(path)
    assert any(message in failure for failure in checked(model, path).failures)


@pytest.mark.parametrize(
    ("layer", "weight", "message"),
    [
        (nn.GRU(8, 8), QuantSpec(7), "layer '0': ONNX Runtime runs a GRU with dynamic activations in floating"),
        (nn.LSTM(8, 8, proj_size=4), QuantSpec(7), "LSTM with projections and with dynamic activations in floating"),
        (nn.LSTM(8, 8), QuantSpec(7, symmetric=False), "one zero point per channel of the weight"),
    ],
)
def test_what_the_operator_does_not_compute_is_refused_before_training(
    layer: nn.Module, weight: QuantSpec, message: str
) -> None:
    with pytest.raises(QatkitError, match=message):
        FORMATS["onnx"].check_model(nn.Sequential(layer), {"0": Scheme(weight, BATCH)})
