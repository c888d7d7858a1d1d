"""`nn.LSTM`, `nn.GRU` and `nn.RNN` in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from qatkit import QatkitError, QatkitWarning, QuantSpec, calibrate, prepare_qat
from qatkit.export.onnx.format import export_onnx
from qatkit.export.onnx.runtime import integer_kernels, load_runtime
from qatkit.export.verification import verify
from tests.export.conftest import UINT8
from tests.export.files import Array, change_constant, constants, first_changed
from tests.support.matrix import representatives

OPTIONS: list[tuple[Any, dict[str, Any]]] = [
    (nn.LSTM, {"bidirectional": True, "num_layers": 2}),
    (nn.GRU, {"bidirectional": True}),
    (nn.RNN, {"nonlinearity": "relu"}),
    (nn.LSTM, {"proj_size": 5, "bidirectional": True}),
    (nn.RNN, {"bidirectional": True, "num_layers": 2}),
    (nn.GRU, {"num_layers": 2, "bias": False}),
    (nn.LSTM, {"bias": False, "batch_first": False}),
]
CASES = [(*option, activation) for option in OPTIONS for activation in (None, UINT8)]


class Tagger(nn.Module):
    """A recurrent layer over ``[batch, time, 8]``, and labels of every step."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(8, 12, **{"batch_first": True, **options})
        self.head = nn.Linear((options.get("proj_size") or 12) * (2 if self.rnn.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        hidden, state = self.rnn(x)
        return self.head(hidden), state


def quantized(kind: Any, weight: QuantSpec, activation: QuantSpec | None, **options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Tagger(kind, **options).eval(), torch.randn(4, 6, 8)
    prepare_qat(model, weight, activation)
    if activation is not None:
        calibrate(model, [x])
    return model, x


def failures(model: nn.Module, x: Tensor, path: Path) -> list[str]:
    batch = (x, torch.zeros(*x.shape[:2], 3))
    return verify(model, path, [batch], threads=1, task="regression", forward=lambda m, batch: m(batch[0])[0]).failures


def tensors(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [tensor for part in outputs for tensor in tensors(part)]


def sequences_apart(model: nn.Module, x: Tensor, path: Path) -> float:
    """The fraction of sequences in which an output of a step, or a final state, differs by more than 1e-6."""
    with torch.no_grad():
        pairs = list(zip(tensors(model(x)), tensors(load_runtime(path, 1)(x)), strict=True))
    steps_first = not model.rnn.batch_first
    apart = []
    for index, (ours, theirs) in enumerate(pairs):
        by_sequence = (
            (ours - theirs).abs().movedim(1 if index or steps_first else 0, 0)
        )  # states are [layers, batch, ..]
        apart.append(by_sequence.flatten(1).amax(1) > 1e-6)
    return float(torch.stack(apart).any(0).float().mean())


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("kind", "options", "activation"), representatives(CASES, {0, 1, 2, 3, 5, 6, 7}))
def test_outputs_and_states_are_the_trained_ones_for_every_length(
    kind: Any, options: dict[str, Any], activation: QuantSpec | None, tmp_path: Path
) -> None:
    path, (model, x) = tmp_path / "model.onnx", quantized(kind, QuantSpec(7), activation, **options)
    export_onnx(model, {"x": x}, path, "token_classification")
    for time in (6, 11):
        inputs = torch.randn((256, time, 8) if options.get("batch_first", True) else (time, 256, 8))
        assert failures(model, inputs, path) == []
        # a value halfway between two codes may round the other way, which changes the steps after it
        assert sequences_apart(model, inputs, path) <= (0 if activation is None else 0.05)
    operator = kind.__name__
    kernels = integer_kernels(path)
    if activation is None:
        steps = kernels.floating.get(operator, 0)
        assert steps == (0 if "proj_size" in options else (1 + model.rnn.bidirectional) * model.rnn.num_layers)
    else:  # products with the input, and the head
        assert kernels.integer == {"MatMulIntegerToFloat": (1 + model.rnn.bidirectional) * model.rnn.num_layers + 1}
    codes = [values for name, values in constants(path).items() if name.endswith("weight.codes")]
    assert len(codes) == len(model.rnn.part_names()) + 1
    assert all(values.dtype == np.int8 for values in codes)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_plain_layer_with_the_decoded_weights_of_the_file_computes_the_same(kind: Any, tmp_path: Path) -> None:
    path, (model, x) = tmp_path / "model.onnx", quantized(kind, QuantSpec(4), None)
    export_onnx(model, x, path)
    file, plain = constants(path), kind(8, 12, batch_first=True)
    with torch.no_grad():
        for part in ("weight_ih_l0", "weight_hh_l0"):
            scale = file[f"rnn.{part}.weight.scale"].reshape(-1, 1)
            getattr(plain, part).copy_(torch.tensor(file[f"rnn.{part}.weight.codes"] * scale))
        for part in ("bias_ih_l0", "bias_hh_l0"):
            getattr(plain, part).copy_(torch.tensor(file[f"rnn.{part}"]))
        expected = plain(x)
    found = tensors(load_runtime(path, 1)(x))[1:]
    for ours, theirs in zip(found, tensors(expected[1]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_the_hidden_state_is_quantized_in_every_step(tmp_path: Path) -> None:
    """An LSTM written in numpy, in float64, from the constants of the file."""
    low = QuantSpec(5, symmetric=False, strategy="tensor")
    path, (model, x) = tmp_path / "model.onnx", quantized(nn.LSTM, QuantSpec(4), low)
    export_onnx(model, x, path)
    file = {name: values.astype(np.float64) for name, values in constants(path).items()}

    def rounded(values: Array, part: str) -> Array:
        scale, zero = file[f"rnn.{part}.input.scale"], file[f"rnn.{part}.input.zero_point"]
        return (np.clip(np.round(values / scale) + zero, 0, 31) - zero) * scale

    def product(values: Array, part: str) -> Array:
        weight = file[f"rnn.weight_{part}_l0.weight.codes"] * file[f"rnn.weight_{part}_l0.weight.scale"][:, None]
        return rounded(values, f"weight_{part}_l0") @ weight.T + file[f"rnn.bias_{part}_l0"]

    def sigmoid(values: Array) -> Array:
        return 1 / (1 + np.exp(-values))

    h, c = np.zeros((4, 12)), np.zeros((4, 12))
    for time in range(6):
        gates = product(x[:, time].double().numpy(), "ih") + product(h, "hh")
        i, f, g, o = np.split(gates, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    hidden, cell = tensors(load_runtime(path, 1)(x))[1:]
    np.testing.assert_allclose(hidden[0].numpy(), h, atol=1e-5)
    np.testing.assert_allclose(cell[0].numpy(), c, atol=1e-5)


@pytest.mark.parametrize("activation", [None, UINT8])
def test_the_file_is_a_quarter_of_the_float_file(activation: QuantSpec | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LSTM(64, 128)).eval(), torch.randn(5, 2, 64)
    export_onnx(model, x, tmp_path / "float.onnx")
    prepare_qat(model, QuantSpec(7), activation)
    calibrate(model, [x])
    export_onnx(model, x, tmp_path / "model.onnx")
    sizes = [(tmp_path / name).stat().st_size for name in ("model.onnx", "float.onnx")]
    assert sizes[0] < 0.3 * sizes[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rnn.weight_ih_l0.weight.codes", "layer 'rnn.weight_ih_l0': codes of the weight: 1 of 384 differ"),
        ("rnn.weight_hh_l0_reverse.weight.scale", "layer 'rnn.weight_hh_l0_reverse': scales of the weight: 1 of 48"),
        ("rnn.weight_hh_l0.input.scale", "layer 'rnn.weight_hh_l0': input: scale: 1 of 1 differ"),
        ("rnn.bias_hh_l0", "layer 'rnn': bias_hh_l0: 1 of 48 differ"),
    ],
)
def test_a_changed_part_is_named(name: str, message: str, tmp_path: Path) -> None:
    path, (model, x) = tmp_path / "model.onnx", quantized(nn.LSTM, QuantSpec(7), UINT8, bidirectional=True)
    export_onnx(model, x, path)
    change_constant(path, name, first_changed)
    assert any(failure.startswith(message) for failure in failures(model, x, path))


def test_a_hidden_state_that_is_not_quantized_is_found(tmp_path: Path) -> None:
    path, (model, x) = tmp_path / "model.onnx", quantized(nn.GRU, QuantSpec(7), UINT8)
    export_onnx(model, x, path)
    proto = onnx.load(path)
    (scan,) = (node for node in proto.graph.node if node.op_type == "Scan")
    body = next(attribute.g for attribute in scan.attribute if attribute.name == "body")
    encoder = next(node for node in body.node if node.op_type == "QuantizeLinear")
    decoder = next(node for node in body.node if encoder.output[0] in node.input)
    product = next(node for node in body.node if decoder.output[0] in node.input)
    product.input[0] = encoder.input[0]
    body.node.remove(decoder)
    body.node.remove(encoder)
    onnx.save(proto, path)
    message = "layer 'rnn.weight_hh_l0': input: no QuantizeLinear node uses its scale and zero point"
    assert message in failures(model, x, path)


class Packed(Tagger):
    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.full((x.shape[0],), 3), batch_first=True)
        out: Tensor = self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])
        return out


def test_what_recurrent_layers_cannot_do_in_onnx_is_refused_by_name(tmp_path: Path) -> None:
    model, x = Packed(nn.LSTM).eval(), torch.randn(4, 6, 8)
    prepare_qat(model, QuantSpec(8))
    with pytest.raises(QatkitError, match="does not support packed sequences; pass padded tensors"):
        export_onnx(model, x, tmp_path / "model.onnx")
    dynamic = QuantSpec(8, symmetric=False, strategy="tensor", dynamic=True)
    model = Tagger(nn.GRU)
    prepare_qat(model, QuantSpec(7), dynamic)
    with pytest.raises(QatkitError, match="layer 'rnn': ONNX Runtime runs a GRU with dynamic activations in floating"):
        export_onnx(model, x, tmp_path / "model.onnx")


def test_8_bit_weights_pass_with_the_warning_of_slow_kernels(tmp_path: Path) -> None:
    path, (model, x) = tmp_path / "model.onnx", quantized(nn.LSTM, QuantSpec(8), UINT8)
    with pytest.warns(QatkitWarning, match="layer 'rnn.weight_ih_l0' and 2 more: 8-bit weights are stored as unsigned"):
        export_onnx(model, x, path)
    assert failures(model, x, path) == []


class Twice(nn.Module):
    """A recurrent and an attention layer, each under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.attn = nn.LSTM(8, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
        self.again, self.attn_again = self.rnn, self.attn

    def forward(self, x: Tensor) -> Tensor:
        y = self.again(self.rnn(x)[0])[0]
        y = self.attn(y, y, y)[0]
        out: Tensor = self.attn_again(y, y, y)[0]
        return out


@pytest.mark.parametrize("activation", [None, UINT8])
def test_a_layer_under_two_names_keeps_its_first_one(activation: QuantSpec | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, model, x = tmp_path / "model.onnx", Twice().eval(), torch.randn(4, 5, 8)
    prepare_qat(model, QuantSpec(7), activation)
    calibrate(model, [x])
    export_onnx(model, x, path)
    batch = (x, torch.zeros(4, 5, 8))
    assert verify(model, path, [batch], threads=1, task="regression").failures == []
    assert not [name for name in constants(path) if "again" in name]
