"""ONNX nodes of recurrent layers: LSTM, GRU and RNN, and Scan with the equations of one step as its body."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}
"""Indices of torch's gates in ONNX order (input, output, forget, cell; update, reset, new), by torch's cell name."""

BIAS = re.compile(r"(^|\.)bias_[ih]h_l\d+(_reverse)?$")
"""Matches the names of the biases of recurrent layers."""

_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "LSTM": {}, "GRU": {"linear_before_reset": 1}, "RNN_TANH": {"activations": ["Tanh"]},
    "RNN_RELU": {"activations": ["Relu"]},
}  # fmt: skip


def recurrent_translations(op: Any) -> dict[Any, Callable[..., Any]]:
    """Return the functions that create the nodes of ``qatkit::recurrent`` and ``qatkit::stepwise``.

    Args:
        op: An opset of onnxscript.
    """

    def recurrent(
        x: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any, hidden: Any, cell_state: Any, mode: str,
        backwards: bool,
    ) -> Any:  # fmt: skip
        order = GATES[mode]

        def in_order(value: Any) -> Any:
            if len(order) == 1:
                return value
            gates = op.Split(value, axis=0, num_outputs=len(order))
            return op.Concat(*(gates[gate] for gate in order), axis=0)

        first = op.Constant(value_ints=[0])
        weights = [op.Unsqueeze(in_order(weight), first) for weight in (weight_ih, weight_hh)]
        biases = [in_order(bias) for bias in (bias_ih, bias_hh) if bias is not None]
        bias = op.Unsqueeze(op.Concat(*biases, axis=0), first) if biases else None
        states = [op.Unsqueeze(state, first) for state in (hidden, cell_state) if state is not None]
        kind = getattr(op, mode.partition("_")[0])
        made = kind(
            x, *weights, bias, None, *states, hidden_size=hidden.shape[1],
            direction="reverse" if backwards else "forward", **_ATTRIBUTES[mode],
        )  # fmt: skip
        outputs, *last = made[:3] if mode == "LSTM" else (*made[:2], made[1])
        return op.Squeeze(outputs, op.Constant(value_ints=[1])), *(op.Squeeze(state, first) for state in last)

    def stepwise(
        from_input: Any, weight_hh: Any, bias_hh: Any, weight_hr: Any, hidden: Any, cell_state: Any, scale: Any,
        zero_point: Any, qmin: int, qmax: int, hr_scale: Any, hr_zero_point: Any, hr_qmin: int, hr_qmax: int, mode: str,
        backwards: bool,
    ) -> Any:  # fmt: skip
        step = _Step()
        weight, projection = (
            None if each is None else op.Transpose(each, perm=[1, 0]) for each in (weight_hh, weight_hr)
        )
        states = [state for state in (hidden, cell_state) if state is not None]
        before = [step.input(state.shape) for state in states]
        x = step.input(from_input.shape[1:])
        product = step("MatMul", step.rounded(before[0], scale, zero_point, qmin, qmax), weight)
        if bias_hh is not None:
            product = step("Add", product, bias_hh)
        after = _EQUATIONS[mode](step, x, product, before)
        if projection is not None:
            rounded = step.rounded(after[0], hr_scale, hr_zero_point, hr_qmin, hr_qmax)
            after[0] = step("MatMul", rounded, projection)
        after = [step("Identity", state) for state in after]
        made = step.scan([*states, from_input], [*after, step("Identity", after[0])], len(states), backwards)
        return made[-1], made[0], made[len(states) - 1]

    ops = torch.ops.qatkit
    return {ops.recurrent.default: recurrent, ops.stepwise.default: stepwise}


class _Step:
    """The body of a Scan: its inputs and nodes. It may also read values of the graph around it."""

    def __init__(self) -> None:
        self.inputs: list[Any] = []
        self.nodes: list[Any] = []

    def input(self, shape: Any) -> Any:
        from onnxscript import ir

        self.inputs.append(ir.Value(shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT)))
        return self.inputs[-1]

    def __call__(self, kind: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        from onnxscript import ir

        node = ir.node(kind, inputs, attributes=attributes, num_outputs=outputs)
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def constant(self, value: Any) -> Any:
        from onnxscript import ir

        return self("Constant", value=ir.tensor(value))

    def rounded(self, x: Any, scale: Any, zero_point: Any, qmin: int, qmax: int) -> Any:
        """The nodes that quantize and dequantize a value; below 8 bits, the codes are clipped."""
        if scale is None:
            return x
        codes = self("QuantizeLinear", x, scale, zero_point)
        if qmax - qmin != 255:
            dtype = np.int8 if qmin < 0 else np.uint8
            codes = self("Clip", codes, *(self.constant(np.array(bound, dtype)) for bound in (qmin, qmax)))
        return self("DequantizeLinear", codes, scale, zero_point)

    def scan(self, inputs: list[Any], results: list[Any], states: int, backwards: bool) -> Any:
        """Add the Scan node to the graph that is being traced, and return its outputs."""
        from onnxscript import evaluator, ir

        for result in results:
            result.type = ir.TensorType(ir.DataType.FLOAT)
        recorder: Any = evaluator.default()  # the exporter's own, whose Scan would have only one output
        node = ir.node(
            "Scan",
            inputs,
            attributes={
                "body": ir.Graph(self.inputs, results, nodes=self.nodes, name="step"),
                "num_scan_inputs": 1,
                "scan_input_directions": [int(backwards)],
                "scan_output_directions": [int(backwards)],
            },
            num_outputs=states + 1,
            version=recorder.opset.version,
        )
        recorder.nodes.append(node)
        return node.outputs


def _lstm(step: _Step, x: Any, product: Any, before: list[Any]) -> list[Any]:
    i, f, g, o = step("Split", step("Add", x, product), outputs=4, axis=-1, num_outputs=4)
    kept = step("Mul", step("Sigmoid", f), before[1])
    cell = step("Add", kept, step("Mul", step("Sigmoid", i), step("Tanh", g)))
    return [step("Mul", step("Sigmoid", o), step("Tanh", cell)), cell]


def _gru(step: _Step, x: Any, product: Any, before: list[Any]) -> list[Any]:
    r, z, n = step("Split", x, outputs=3, axis=-1, num_outputs=3)
    hr, hz, hn = step("Split", product, outputs=3, axis=-1, num_outputs=3)
    reset, update = (step("Sigmoid", step("Add", *pair)) for pair in ((r, hr), (z, hz)))
    new = step("Tanh", step("Add", n, step("Mul", reset, hn)))
    kept = step("Sub", step.constant(np.array(1, np.float32)), update)
    return [step("Add", step("Mul", kept, new), step("Mul", update, before[0]))]


_EQUATIONS: dict[str, Callable[[_Step, Any, Any, list[Any]], list[Any]]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": lambda step, x, product, _: [step("Tanh", step("Add", x, product))],
    "RNN_RELU": lambda step, x, product, _: [step("Relu", step("Add", x, product))],
}


def name_steps(graph_model: Any) -> None:
    """Name the values in the bodies of Scan nodes, so that they do not reuse names of the surrounding graph."""
    for index, node in enumerate(node for node in graph_model.graph if node.op_type == "Scan"):
        body = node.attributes["body"].as_graph()
        values = [*body.inputs, *(output for each in body for output in each.outputs)]
        for number, value in enumerate(values):
            value.name = f"scan_{index}.{number}"
