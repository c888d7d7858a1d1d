"""Convert the nodes of an ONNX graph to operations of LiteRT.

A node becomes an integer operation if everything that it reads is stored as codes and its result, after a ReLU, is
quantized. Otherwise, it becomes a floating-point operation on decoded values, which computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qatkit.errors import QatkitError
from qatkit.export.litert.content import Grid
from qatkit.export.litert.graph import CODE_SHIFT, INSTEAD, TRANSPOSE, Graph, Kind

_NONE, _RELU, _RELU6 = np.int8(0), np.int8(1), np.int8(3)
"""LiteRT's numbers of fused activation functions."""
_QUANTIZE, _RESHAPE, _MEAN = Kind(114), Kind(22), Kind(40, 2, 27)
_ADD, _MUL, _SUB, _DIV = Kind(0, 2, 11), Kind(18, 2, 21), Kind(41, 1, 28), Kind(42, 1, 29)
_CONCAT, _SOFTMAX, _LEAKY_RELU, _GELU = Kind(2, 1, 10), Kind(25, 1, 9), Kind(98, 1, 75), Kind(150, 1, 116)


@dataclass(frozen=True)
class Fused:
    """The quantized result of an integer operation."""

    activation: np.int8
    """The fused activation function."""
    quantize: Any
    """The node that quantizes the result."""
    skipped: str
    """The value before the quantization, if the fused function computes it."""

    @property
    def value(self) -> str:
        """The codes."""
        return str(self.quantize.output[0])


def attributes(node: Any) -> dict[str, Any]:
    """Return the attributes of a node by name."""
    from onnx import helper

    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def unsupported(node: Any, what: str) -> QatkitError:
    """Return the error for a node that cannot be converted."""
    return QatkitError(f"LiteRT export does not support {what} ('{node.output[0]}')", advice=INSTEAD)


def fused(graph: Graph, node: Any) -> Fused | None:
    """Return the quantized result of a node, after a fused ReLU; None if another node reads it in floating point."""
    reader, activation, skipped = graph.reader(node.output[0]), _NONE, ""
    if reader is not None and (kind := _clipped(graph, reader)) is not None:
        skipped, activation = reader.output[0], kind
        reader = graph.reader(skipped)
    if reader is None or reader.op_type != "QuantizeLinear":
        return None
    return Fused(activation, reader, skipped)


def _clipped(graph: Graph, node: Any) -> np.int8 | None:
    """The number of a ReLU or ReLU6; None for other nodes."""
    if node.op_type == "Relu":
        return _RELU
    if node.op_type == "Clip":
        bounds = [graph.constants.get(name) for name in node.input[1:3]]
        if [None if bound is None else float(bound) for bound in bounds] == [0.0, 6.0]:
            return _RELU6
    return None


def write_codes(graph: Graph, result: Fused, last: bool) -> int:
    """Add the codes of an integer operation's result, under the name of their quantizer."""
    name, grid = _quantizer(graph, result.quantize)
    graph.skipped.add(result.skipped)
    return graph.new_codes(result.value, name, grid, last)


def _quantizer(graph: Graph, node: Any) -> tuple[str, Grid]:
    scale, zero_point = (graph.constants[name] for name in node.input[1:3])
    shift = CODE_SHIFT if zero_point.dtype == np.uint8 else 0
    name = str(node.input[1]).removesuffix(".scale")
    return name, Grid(scale.reshape(1), zero_point.reshape(1).astype(np.int64) - shift)


def quantize(graph: Graph, node: Any) -> None:
    """Round values to codes, unless an integer operation has computed these codes."""
    if graph.has_codes(node.output[0]):
        return
    name, grid = _quantizer(graph, node)
    values = graph.float(node.input[0], last := graph.form(node.input[0]).last)
    graph.emit(_QUANTIZE, [values], graph.new_codes(node.output[0], name, grid, last))


def dequantize(graph: Graph, node: Any) -> None:
    """Keep the codes of an activation, which are decoded where they are read."""
    graph.same(node.output[0], node.input[0])


def add(graph: Graph, node: Any) -> None:
    """Add or multiply codes, or compute with floating-point values."""
    kind = {"Add": _ADD, "Mul": _MUL, "Sub": _SUB, "Div": _DIV}[node.op_type]
    forms = [None if name in graph.constants or name in graph.weights else graph.form(name) for name in node.input]
    last = any(form is not None and form.last for form in forms)
    activations = [name for name, form in zip(node.input, forms, strict=True) if form is not None]
    if last and any(len(graph.shape(name)) != 4 for name in activations):
        last = False
    result = fused(graph, node) if node.op_type in ("Add", "Mul") else None
    if result is not None and None not in forms and all(graph.has_codes(name) for name in node.input):
        operands = [graph.codes(name, last) for name in node.input]
        graph.emit(kind, operands, write_codes(graph, result, last), {0: result.activation})
        return
    graph.emit(
        kind, [graph.float(name, last) for name in node.input], graph.new_float(node.output[0], last), {0: _NONE}
    )


def elementwise(graph: Graph, node: Any) -> None:
    """Apply a function to floating-point values."""
    kind, options = _elementwise(graph, node)
    last = graph.form(node.input[0]).last
    graph.emit(kind, [graph.float(node.input[0], last)], graph.new_float(node.output[0], last), options)


def _elementwise(graph: Graph, node: Any) -> tuple[Kind, dict[int, Any]]:
    settings = attributes(node)
    if node.op_type == "LeakyRelu":
        return _LEAKY_RELU, {0: np.float32(settings.get("alpha", 0.01))}
    if node.op_type == "Gelu":
        return _GELU, {0: np.bool_(settings.get("approximate", b"none") == b"tanh")}
    if node.op_type == "Clip" and _clipped(graph, node) is None:
        raise unsupported(node, "a clip other than ReLU6")
    codes = {"Relu": 19, "Clip": 21, "Sigmoid": 14, "Tanh": 28, "HardSwish": 117}
    return Kind(codes[node.op_type]), {}


def softmax(graph: Graph, node: Any) -> None:
    """Compute a softmax over the last dimension."""
    if attributes(node).get("axis", -1) not in (-1, len(graph.shape(node.input[0])) - 1):
        raise unsupported(node, "a softmax over a dimension other than the last")
    x = graph.float(node.input[0], False)
    graph.emit(_SOFTMAX, [x], graph.new_float(node.output[0], False), {0: np.float32(1)})


def concat(graph: Graph, node: Any) -> None:
    """Concatenate floating-point values: the inputs of a quantized one have different scales."""
    axis = attributes(node)["axis"] % len(graph.shape(node.output[0]))
    inputs = [graph.float(name, False) for name in node.input]
    options = {0: np.int32(axis), 1: _NONE}
    graph.emit(_CONCAT, inputs, graph.new_float(node.output[0], False), options)


def reshape(graph: Graph, node: Any) -> None:
    """Change the shape of codes or values, and keep their order."""
    name, out = node.input[0], node.output[0]
    shape = graph.shape(out)
    if shape.count(-1) > 1:
        raise unsupported(node, "a reshape to several sizes that vary")
    before, has_codes = graph.shape(name), graph.has_codes(name)
    last = graph.form(name).last and before[2:] != (1, 1)  # without positions, both layouts are equal
    if last or not graph.form(name).last:
        x = graph.codes(name, False) if has_codes else graph.float(name, False)
    else:
        x = graph.form(name).index
    y = graph.new_codes(out, graph.quantizer(name), graph.grid(name), False) if has_codes else None
    graph.emit(_RESHAPE, [x, graph.numbers(*shape)], graph.new_float(out, False) if y is None else y)


def transpose(graph: Graph, node: Any) -> None:
    """Change the order of dimensions."""
    name, out = node.input[0], node.output[0]
    if name in graph.weights:
        graph.weights[out] = graph.weights[name]  # read by a product, which transposes it back
        return
    order = attributes(node)["perm"]
    if graph.has_codes(name):
        x, y = graph.codes(name, False), graph.new_codes(out, graph.quantizer(name), graph.grid(name), False)
    else:
        x, y = graph.float(name, False), graph.new_float(out, False)
    graph.emit(TRANSPOSE, [x, graph.numbers(*order)], y)


def identity(graph: Graph, node: Any) -> None:
    """Keep the values."""
    graph.same(node.output[0], node.input[0])


def constant(graph: Graph, node: Any) -> None:
    """Note a constant."""
    from onnx import numpy_helper

    graph.constants[node.output[0]] = numpy_helper.to_array(attributes(node)["value"])


def mean(graph: Graph, node: Any) -> None:
    """Average over all positions of images."""
    name, options = node.input[0], {0: np.bool_(True)}
    result, axes = fused(graph, node), graph.numbers(1, 2)
    if result is not None and result.activation == _NONE and graph.has_codes(name):
        graph.emit(_MEAN, [graph.codes(name, True), axes], write_codes(graph, result, True), options)
    else:
        graph.emit(_MEAN, [graph.float(name, True), axes], graph.new_float(node.output[0], True), options)


def batch_norm(graph: Graph, node: Any) -> None:
    """Multiply and add constants."""
    gamma, beta, average, variance = (graph.constants[name] for name in node.input[1:])
    factor = gamma / np.sqrt(variance + np.float32(attributes(node).get("epsilon", 1e-5)))
    last = len(graph.shape(node.input[0])) == 4
    scaled = graph.new_float(node.output[0], last)
    shifted = graph.new_float(node.output[0], last)
    name = str(node.input[1]).removesuffix(".weight")
    for kind, x, values, part, out in (
        (_MUL, graph.float(node.input[0], last), factor, "factor", scaled),
        (_ADD, scaled, beta - average * factor, "term", shifted),
    ):
        graph.emit(kind, [x, graph.constant(f"{name}.{part}", values.astype(np.float32))], out, {0: _NONE})


Handler = Callable[[Graph, Any], None]
BASIC: dict[str, Handler] = {
    "QuantizeLinear": quantize,
    "DequantizeLinear": dequantize,
    **dict.fromkeys(("Add", "Mul", "Sub", "Div"), add),
    **dict.fromkeys(("Relu", "Clip", "Sigmoid", "Tanh", "HardSwish", "LeakyRelu", "Gelu"), elementwise),
    "Softmax": softmax,
    "Concat": concat,
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten"), reshape),
    "Transpose": transpose,
    "Identity": identity,
    "Constant": constant,
    "GlobalAveragePool": mean,
    "BatchNormalization": batch_norm,
}
"""Functions that convert a node, by its operator; see also `qatkit.export.litert.products`."""
