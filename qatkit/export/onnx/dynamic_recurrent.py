"""LSTMs with dynamic activations: the operator DynamicQuantizeLSTM of ONNX Runtime.

It quantizes the input of all steps with one scale, and in each step the hidden state with one scale. Products have
integer kernels; gates and states are floating-point. `quantize_dynamic` writes the same operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qatkit.export.onnx.contributed import contributed
from qatkit.export.onnx.recurrent import GATES

OPERATOR = "DynamicQuantizeLSTM"
_ORDER = GATES["LSTM"]
_WEIGHTS, _SCALES, _POINTS = (1, 2), (8, 10), (9, 11)
"""Positions of the operator's inputs for the weight of the input and of the hidden state."""


def dynamic_lstm_translation(op: Any) -> Callable[..., Any]:
    """Return the function that creates the nodes of ``qatkit::dynamic_lstm``.

    Args:
        op: An opset of onnxscript.
    """
    lstm = contributed(
        OPERATOR,
        ("X", "W", "R"),
        ("B", "sequence_lens", "initial_h", "initial_c", "P", "W_scale", "W_zero_point", "R_scale", "R_zero_point"),
        ("hidden_size",),
        ("direction",),
        ("Y", "Y_h", "Y_c"),
    )

    def translate(
        x: Any, ih_codes: Any, ih_scale: Any, ih_zero_point: Any, hh_codes: Any, hh_scale: Any, hh_zero_point: Any,
        bias_ih: Any, bias_hh: Any, hidden: Any, cell_state: Any, backwards: bool,
    ) -> Any:  # fmt: skip
        first, direction = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])

        def in_order(value: Any) -> Any:
            gates = op.Split(value, axis=0, num_outputs=len(_ORDER))
            return op.Concat(*(gates[gate] for gate in _ORDER), axis=0)

        def weight(codes: Any) -> Any:
            return op.Unsqueeze(op.Transpose(in_order(codes), perm=[1, 0]), first)

        def per_direction(value: Any) -> Any:
            """``[1]``, or ``[1, gates * hidden]`` if every output has a value of its own."""
            return op.Unsqueeze(in_order(value) if len(value.shape) else value, first)

        def point(value: Any, codes: Any) -> Any:
            from onnxscript import ir

            if value is not None:
                return per_direction(value)
            dtype = np.int8 if codes.dtype == ir.DataType.INT8 else np.uint8
            return op.Constant(value=ir.tensor(np.zeros(1, dtype)))

        biases = [in_order(bias) for bias in (bias_ih, bias_hh) if bias is not None]
        bias = op.Unsqueeze(op.Concat(*biases, axis=0), first) if biases else None
        made = lstm(
            x, weight(ih_codes), weight(hh_codes), bias, None, op.Unsqueeze(hidden, first),
            op.Unsqueeze(cell_state, first), None, per_direction(ih_scale), point(ih_zero_point, ih_codes),
            per_direction(hh_scale), point(hh_zero_point, hh_codes), hidden_size=hidden.shape[1],
            direction="reverse" if backwards else "forward",
        )  # fmt: skip
        outputs, *last = made
        return op.Squeeze(outputs, direction), *(op.Squeeze(state, first) for state in last)

    return translate


@dataclass(frozen=True)
class RecurrentProduct:
    """The product of one weight inside a DynamicQuantizeLSTM node, as verification reads it from a file."""

    weight: tuple[str, ...]
    """The names of the weight's codes and scale, and of its zero point if there is one."""
    values: tuple[str, str, str]
    """The names of the node's inputs: the rearranged codes ``[1, in, gates * hidden]``, scales and zero points."""
    nodes: tuple[Any, ...]
    """The nodes that rearrange constants to these inputs."""
    output: str
    """The name of the node's first output."""

    def decoded(self, proto: Any) -> np.ndarray[Any, Any]:
        """The weight ``[gates * hidden, in]`` that the operator multiplies, with gates in torch's order.

        ONNX Runtime rearranges the codes as it does when it loads the file.
        """
        import onnxruntime
        from onnx import helper

        graph = helper.make_graph(
            list(self.nodes),
            "decode",
            [],
            [helper.make_empty_tensor_value_info(name) for name in self.values],
            [tensor for tensor in proto.graph.initializer if tensor.name in self.weight],
        )
        single = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(single.SerializeToString(), options, providers=["CPUExecutionProvider"])
        codes, scale, point = (value[0] for value in session.run(None, {}))
        weight = ((codes.astype(np.float32) - point.astype(np.float32)) * scale).T
        gates = np.split(weight, len(_ORDER))
        return np.concatenate([gates[_ORDER.index(gate)] for gate in range(len(_ORDER))])


def recurrent_products(proto: Any) -> dict[str, list[RecurrentProduct]]:
    """Return the products of each weight, by the name of its codes.

    Args:
        proto: A graph read from a file.
    """
    makers = {output: node for node in proto.node for output in node.output}
    constants = {tensor.name for tensor in proto.initializer}
    found: dict[str, list[RecurrentProduct]] = {}
    for node in proto.node:
        if node.op_type != OPERATOR:
            continue
        for positions in zip(_WEIGHTS, _SCALES, _POINTS, strict=True):
            values = [node.input[position] for position in positions]
            nodes, read = _rearranging(values, makers, constants)
            if read:
                found.setdefault(read[0], []).append(
                    RecurrentProduct(read, (values[0], values[1], values[2]), nodes, node.output[0])
                )
    return found


_REARRANGING = ("Unsqueeze", "Transpose", "Concat", "Split", "Constant")


def _rearranging(
    values: list[str], makers: Mapping[str, Any], constants: set[str]
) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """The nodes that make values from named constants, in the order of their computation, and these constants.

    There are none if other operators take part.
    """
    nodes: dict[str, Any] = {}
    read: list[str] = []

    def visit(name: str) -> bool:
        if name in constants:
            read.extend([name] if name not in read else [])
            return True
        node = makers.get(name)
        if node is None or node.op_type not in _REARRANGING:
            return False
        known = all(visit(each) for each in node.input if each)
        nodes.setdefault(node.output[0], node)
        return known

    complete = all(visit(name) for name in values)
    return (tuple(nodes.values()), tuple(read)) if complete else ((), ())
