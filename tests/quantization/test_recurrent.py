"""`nn.LSTM`, `nn.GRU` and `nn.RNN`: torch's own outputs, from fake-quantized weights, inputs and hidden states."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from qatkit import QatkitWarning, QuantSpec, calibrate, prepare_qat, strip_qat
from qatkit.export.dense import export_dense
from qatkit.export.formats import FORMATS
from qatkit.export.interface import PlannedExport
from qatkit.quantization.measure import layer_table
from qatkit.quantization.ptq.runner import apply_ptq
from qatkit.quantization.state import load_quantizers, save_quantizers
from tests.quantization.families import A8, TOKEN, W4, rounded

LSQ = QuantSpec(4, observer="lsq")
KINDS: dict[str, Any] = {
    "lstm": lambda: nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True),
    "lstm with projection": lambda: nn.LSTM(5, 6, num_layers=2, proj_size=3),
    "gru": lambda: nn.GRU(5, 6, num_layers=2, bias=False, bidirectional=True),
    "rnn": lambda: nn.RNN(5, 6, nonlinearity="relu", bidirectional=True),
}


class Layer(nn.Module):
    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor | PackedSequence, hx: Any = None) -> Any:
        return self.rnn(x, hx)


def plain_of(model: Layer) -> Layer:
    """A plain copy with the weights that the forward pass uses."""
    plain = copy.deepcopy(model)
    strip_qat(plain)
    with torch.no_grad():
        for name, parameter in plain.rnn.named_parameters():
            if name.startswith("weight"):
                parameter.copy_(rounded(parameter, W4))
    return plain


def inputs(rnn: nn.RNNBase) -> list[tuple[Any, Any]]:
    """A batch, one with given states, a sequence without a batch, and packed sequences of several lengths."""
    torch.manual_seed(0)
    x, lengths = torch.randn(3, 3, 5), torch.tensor([2, 3, 1])
    runs = rnn.num_layers * (2 if rnn.bidirectional else 1)
    h, c = torch.randn(runs, 3, rnn.proj_size or 6), torch.randn(runs, 3, 6)
    state, one = ((h, c), (h[:, 0], c[:, 0])) if rnn.mode == "LSTM" else (h, h[:, 0])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    ordered = pack_padded_sequence(x, torch.tensor([3, 2, 2]))
    return [(x, None), (x, state), (x[0], one), (packed, None), (packed, state), (ordered, state)]


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_torchs_kernel_runs_with_the_rounded_weights_of_every_gate(make: Any) -> None:
    model = Layer(make())
    structure, keys = str(model), list(model.state_dict())
    assert prepare_qat(model, W4) == ["rnn"]
    assert list(model.state_dict()) == keys
    plain = plain_of(model)
    for x, state in inputs(model.rnn):
        assert _flat(model(x, state)) == _flat(plain(x, state))
    model(*inputs(model.rnn)[0])[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    strip_qat(model)
    assert str(model) == structure
    assert type(model.rnn) is type(plain.rnn)
    with torch.no_grad():
        assert _flat(model(*inputs(model.rnn)[0])) != _flat(plain(*inputs(model.rnn)[0]))


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_the_steps_of_quantized_inputs_are_those_of_torch(make: Any) -> None:
    model = Layer(make())
    prepare_qat(model, W4, A8)
    plain = plain_of(model)
    for x, state in inputs(model.rnn):
        # during calibration nothing but the weights is quantized
        ours: list[Any] = []
        calibrate(model, [(x, state)], lambda batch, ours=ours: ours.append(model(*batch)))
        with torch.no_grad():
            torch.testing.assert_close(_tensors(ours[0]), _tensors(plain(x, state)))
    assert not torch.equal(_tensors(model(*inputs(model.rnn)[0]))[0], _tensors(plain(*inputs(model.rnn)[0]))[0])


def test_each_step_reads_the_quantized_input_and_hidden_state() -> None:
    for activation in (A8, TOKEN):
        model = Layer(nn.RNN(5, 6))
        x, h = torch.randn(3, 2, 5), torch.randn(1, 2, 6)
        prepare_qat(model, W4, activation)
        calibrate(model, [(x, h)], functools.partial(_call, model))
        rnn: Any = model.rnn
        step = h[0]
        for time in range(3):
            read = rnn.input_quantizer("weight_ih_l0")(x)[time], rnn.input_quantizer("weight_hh_l0")(step)
            products = [
                part @ rounded(w).t() for part, w in zip(read, (rnn.weight_ih_l0, rnn.weight_hh_l0), strict=True)
            ]
            step = (products[0] + rnn.bias_ih_l0 + products[1] + rnn.bias_hh_l0).tanh()
        torch.testing.assert_close(model(x, h)[1][0], step)
        assert not torch.equal(rnn.input_quantizer("weight_hh_l0")(step), step)


def test_dropout_between_layers_is_torchs_own() -> None:
    model = Layer(nn.GRU(5, 6, num_layers=2, dropout=0.5))
    x = torch.randn(3, 2, 5)
    prepare_qat(model, W4, TOKEN)
    first, second = model(x)[0], model(x)[0]
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_a_copy_a_pickle_and_a_saved_model_compute_the_same(tmp_path: Path) -> None:
    model = Layer(nn.LSTM(5, 6))
    fresh, x = copy.deepcopy(model), torch.randn(3, 2, 5)
    prepare_qat(model, LSQ, A8)
    calibrate(model, [x])
    save_quantizers(model, tmp_path / "q.safetensors")
    assert load_quantizers(fresh, tmp_path / "q.safetensors") == ["rnn"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(other(x)[0], model(x)[0])


def test_a_dense_file_tables_and_ptq_know_every_weight_and_onnx_accepts_them(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, plain, x = Layer(nn.GRU(5, 6)), Layer(nn.GRU(5, 6)), torch.randn(3, 2, 5)
    prepare_qat(model, LSQ)
    names = ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert [(row.name, row.weights) for row in layer_table(model)] == [(names[0], 90), (names[1], 108)]
    assert apply_ptq(model, "mse", []) == names
    with pytest.warns(QatkitWarning, match=r"keep their scales: rnn\.weight_ih_l0 \(recurrent layers\), .*hh_l0"):
        assert apply_ptq(model, "gptq", [x]) == []
    export_dense(model, tmp_path / "model.safetensors")
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(plain(x)[0], model(x)[0])
    FORMATS["onnx"].call("check", model, PlannedExport.of(model))
    strip_qat(model)
    prepare_qat(model, W4, TOKEN)
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        model(x, torch.zeros(1, 3, 6))


def _call(model: Layer, batch: tuple[Any, Any]) -> Any:
    return model(*batch)


def _tensors(result: Any) -> list[Tensor]:
    """The output and the last states."""
    out, state = result
    return [out.data, *(state if isinstance(state, tuple) else (state,))]


def _flat(result: Any) -> list[Any]:
    return [tensor.tolist() for tensor in _tensors(result)]


def test_smoothquant_names_the_weights_that_it_leaves_alone() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(8, 8)
            self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

        def forward(self, x: Tensor) -> Tensor:
            tags: Tensor = self.head(self.rnn(x)[0])
            return tags

    model = Tagger()
    prepare_qat(model, QuantSpec(8), TOKEN)
    with pytest.warns(QatkitWarning, match=r"^smoothquant: these layers keep their scales: rnn\.weight_ih_l0 "):
        assert apply_ptq(model, "smoothquant", [torch.randn(3, 2, 8)]) == ["head.2"]
