"""Recurrent layers in a QDQ graph: the ONNX operators LSTM, GRU and RNN, or a Scan over single steps.

A weight-only layer becomes the ONNX operator of the cell, whose weights are dequantized when the file is loaded. If
inputs and hidden states are quantized, the products with the input run for all steps at once, and a Scan computes the
steps, because the hidden state is quantized before each product. LSTMs with projections also become a Scan: the ONNX
operator has no projection. With dynamic activations, an LSTM becomes ONNX Runtime's operator DynamicQuantizeLSTM
(`qatkit.export.onnx.dynamic_recurrent`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.export.onnx.qdq_nodes import Codes, DynamicInputQuantizer, InputQuantizer
from qatkit.quantization.recurrent import QATRecurrent, State, next_state

Steps = tuple[Tensor, Tensor, Tensor]
"""All hidden states ``[time, batch, hidden]``, and the last hidden and cell state; only an LSTM has a cell state."""


class QDQRecurrent(QATRecurrent):
    """`nn.LSTM`, `nn.GRU` or `nn.RNN` whose weights are quantized linear layers without a bias."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        return self._stepwise(input, hx)

    def _run(
        self, suffix: str, x: Tensor, state: State, lengths: Tensor | None, backwards: bool
    ) -> tuple[Tensor, State]:
        if lengths is not None:
            raise QatkitError(
                "ONNX export does not support packed sequences",
                advice="pass padded tensors to recurrent layers, or use export: {format: dense}",
            )
        of_input, of_hidden = (cast(Any, self._modules[f"weight_{part}_{suffix}"]) for part in ("ih", "hh"))
        input_bias, hidden_bias = (getattr(self, f"bias_{part}_{suffix}", None) for part in ("ih", "hh"))
        hidden, cell_state = (*state, None)[:2]
        projection: Any = self._modules.get(f"weight_hr_{suffix}")
        steps: Steps
        if isinstance(of_hidden.input, DynamicInputQuantizer):
            weights = (part for layer in (of_input, of_hidden) for part in _stored(layer.weight))
            steps = torch.ops.qatkit.dynamic_lstm(
                x, *weights, input_bias, hidden_bias, hidden, cell_state, backwards
            )  # fmt: skip
        elif of_hidden.input is None and projection is None:
            steps = torch.ops.qatkit.recurrent(
                x, _decoded(of_input), _decoded(of_hidden), input_bias, hidden_bias, hidden, cell_state, self.mode,
                backwards,
            )  # fmt: skip
        else:
            from_input = of_input(x)
            steps = torch.ops.qatkit.stepwise(
                from_input if input_bias is None else from_input + input_bias,
                _decoded(of_hidden), hidden_bias, None if projection is None else _decoded(projection), hidden,
                cell_state, *_grid(of_hidden), *_grid(projection), self.mode, backwards,
            )  # fmt: skip
        return steps[0], steps[1:] if self.mode == "LSTM" else steps[1:2]


def _decoded(layer: Any) -> Tensor:
    weight: Tensor = layer.weight() if isinstance(layer.weight, Codes) else layer.weight
    return weight


def _stored(weight: Codes) -> tuple[Tensor, Tensor, Tensor | None]:
    return weight.codes, weight.scale, weight.zero_point


def _grid(layer: Any) -> tuple[Tensor | None, Tensor | None, int, int]:
    """The scale, zero point and range of the codes of a layer's input; None and 0 if it is not quantized."""
    quantizer = None if layer is None else layer.input
    if not isinstance(quantizer, InputQuantizer):
        return None, None, 0, 0
    return quantizer.scale, quantizer.zero_point, int(quantizer.qmin), int(quantizer.qmax)


@torch.library.custom_op("qatkit::recurrent", mutates_args=())
def _recurrent(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    hidden: Tensor,
    cell_state: Tensor | None,
    mode: str,
    backwards: bool,
) -> Steps:
    from_input = nn.functional.linear(x, weight_ih, bias_ih)
    return _steps(
        from_input, lambda h: nn.functional.linear(h, weight_hh, bias_hh), hidden, cell_state, mode, backwards
    )


@torch.library.custom_op("qatkit::stepwise", mutates_args=())
def _stepwise(
    from_input: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    hidden: Tensor,
    cell_state: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    hr_scale: Tensor | None,
    hr_zero_point: Tensor | None,
    hr_qmin: int,
    hr_qmax: int,
    mode: str,
    backwards: bool,
) -> Steps:
    def product(h: Tensor) -> Tensor:
        return nn.functional.linear(_rounded(h, scale, zero_point, qmin, qmax), weight_hh, bias_hh)

    def project(h: Tensor) -> Tensor:
        assert weight_hr is not None
        return nn.functional.linear(_rounded(h, hr_scale, hr_zero_point, hr_qmin, hr_qmax), weight_hr)

    last = None if weight_hr is None else project
    return _steps(from_input, product, hidden, cell_state, mode, backwards, last)


def _rounded(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    if scale is None or zero_point is None:
        return x
    codes = torch.ops.qatkit.quantize_linear(x, scale, zero_point, qmin, qmax)
    out: Tensor = torch.ops.qatkit.dequantize_linear(codes, scale, zero_point, 0)
    return out


def _steps(
    from_input: Tensor,
    product: Callable[[Tensor], Tensor],
    hidden: Tensor,
    cell_state: Tensor | None,
    mode: str,
    backwards: bool,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Steps:
    state: State = (hidden,) if cell_state is None else (hidden, cell_state)
    outputs = [hidden] * len(from_input)
    for time in reversed(range(len(from_input))) if backwards else range(len(from_input)):
        state = next_state(mode, from_input[time], product(state[0]), state)
        if project is not None:
            state = (project(state[0]), *state[1:])
        outputs[time] = state[0]
    return torch.stack(outputs), state[0].clone(), state[-1].clone()


@torch.library.custom_op("qatkit::dynamic_lstm", mutates_args=())
def _dynamic_lstm(
    x: Tensor,
    ih_codes: Tensor,
    ih_scale: Tensor,
    ih_zero_point: Tensor | None,
    hh_codes: Tensor,
    hh_scale: Tensor,
    hh_zero_point: Tensor | None,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    hidden: Tensor,
    cell_state: Tensor,
    backwards: bool,
) -> Steps:
    from_input = torch.ops.qatkit.dynamic_linear(x, ih_codes, ih_scale, ih_zero_point)

    def product(h: Tensor) -> Tensor:
        out: Tensor = torch.ops.qatkit.dynamic_linear(h, hh_codes, hh_scale, hh_zero_point)
        return out if bias_hh is None else out + bias_hh

    return _steps(
        from_input if bias_ih is None else from_input + bias_ih, product, hidden, cell_state, "LSTM", backwards
    )


@_recurrent.register_fake
def _(x: Tensor, *args: Any) -> Steps:
    return _shapes(x, *args[4:6])


@_stepwise.register_fake
def _(from_input: Tensor, *args: Any) -> Steps:
    return _shapes(from_input, *args[3:5])


@_dynamic_lstm.register_fake
def _(x: Tensor, *args: Any) -> Steps:
    return _shapes(x, *args[8:10])


def _shapes(x: Tensor, hidden: Tensor, cell_state: Tensor | None) -> Steps:
    last = hidden if cell_state is None else cell_state
    return x.new_empty(*x.shape[:2], hidden.shape[1]), torch.empty_like(hidden), torch.empty_like(last)
