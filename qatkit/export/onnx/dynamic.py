"""ONNX nodes of linear layers whose input is quantized dynamically: products of integers, scaled afterwards.

These are the nodes of `quantize_dynamic`. ONNX Runtime fuses them with the bias, and leaves the additions before
LayerNorm to another fusion; it does neither for a dequantized input and weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

ROWS = 1024
"""Rows of a weight that are decoded at a time."""


def dynamic_linear(op: Any, x: Any, codes: Any, scale: Any, zero_point: Any) -> Any:
    """Create the nodes of ``qatkit::dynamic_linear``.

    Args:
        op: An opset of onnxscript.
        x: The input ``[..., in]``.
        codes: Codes of the weight ``[out, in]``.
        scale: Scales of the weight ``[out]`` or ``[]``.
        zero_point: The same of the zero points; None if they are 0.
    """
    from onnxscript import ir

    values, x_scale, x_point = op.DynamicQuantizeLinear(x)
    sums = op.MatMulInteger(values, op.Transpose(codes, perm=[1, 0]), x_point, zero_point)
    return op.Mul(op.Cast(sums, to=ir.DataType.FLOAT), op.Mul(x_scale, scale))


@dataclass(frozen=True)
class IntegerProduct:
    """The nodes of one product."""

    transpose: Any
    product: Any
    cast: Any
    scales: Any
    scaled: Any

    @property
    def output(self) -> str:
        """The name of the product."""
        return str(self.scaled.output[0])

    @property
    def weight(self) -> tuple[str, ...]:
        """The names of the weight's codes and scale, and of its zero point if there is one."""
        return (self.transpose.input[0], self.scales.input[1], *self.product.input[3:])

    @property
    def input(self) -> tuple[str, ...]:
        """The names of the input's codes, scale and zero point."""
        return (self.product.input[0], self.scales.input[0], self.product.input[2])

    def decoded(self, proto: Any) -> np.ndarray[Any, Any]:
        """The weight ``[out, in]``, which ONNX Runtime multiplies by rows of the identity matrix."""
        import onnxruntime
        from onnx import TensorProto, helper

        nodes = [self.transpose, self.product, self.cast, self.scales, self.scaled]
        kinds = (TensorProto.UINT8, TensorProto.FLOAT, TensorProto.UINT8)
        constants = [tensor for tensor in proto.graph.initializer if tensor.name in self.weight]
        graph = helper.make_graph(
            nodes,
            "decode",
            [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(self.input, kinds, strict=True)],
            [helper.make_tensor_value_info(self.output, TensorProto.FLOAT, None)],
            constants,
        )
        single = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(single.SerializeToString(), options, providers=["CPUExecutionProvider"])
        width = next(tensor.dims[1] for tensor in constants if tensor.name == self.weight[0])
        names, one, zero = self.input, np.array(1, np.float32), np.array(0, np.uint8)
        identity = [np.eye(min(ROWS, width - row), width, row, np.uint8) for row in range(0, width, ROWS)]
        parts = [session.run(None, dict(zip(names, (rows, one, zero), strict=True)))[0] for rows in identity]
        return np.concatenate(parts).T


def integer_products(proto: Any) -> dict[str, list[IntegerProduct]]:
    """Return the products of each weight, by the name of its codes.

    Args:
        proto: A graph read from a file.
    """
    makers = {output: node for node in proto.node for output in node.output}
    readers: dict[str, list[Any]] = {}
    for node in proto.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[str, list[IntegerProduct]] = {}
    for node in proto.node:
        if node.op_type == "MatMulInteger" and (made := _product(node, makers, readers)) is not None:
            found.setdefault(made.weight[0], []).append(made)
    return found


def _product(node: Any, makers: Mapping[str, Any], readers: Mapping[str, list[Any]]) -> IntegerProduct | None:
    """The nodes around a MatMulInteger node; None if they are not those of `dynamic_linear`."""
    transpose, [*after] = makers.get(node.input[1]), readers.get(node.output[0], [])
    for cast in after:
        for scaled in readers.get(cast.output[0], []):
            scales = makers.get(scaled.input[1])
            kinds = [None if each is None else each.op_type for each in (transpose, cast, scales, scaled)]
            if kinds == ["Transpose", "Cast", "Mul", "Mul"]:
                return IntegerProduct(transpose, node, cast, scales, scaled)
    return None
