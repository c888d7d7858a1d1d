"""Convert convolutions, linear layers and pooling to operations of LiteRT."""

from __future__ import annotations

from typing import Any

import numpy as np

from qatkit.export.litert.content import Grid, Tensor
from qatkit.export.litert.graph import Graph, Kind, Weight
from qatkit.export.litert.operators import BASIC, Fused, Handler, attributes, fused, unsupported, write_codes

_CONV, _DEPTHWISE, _LINEAR = Kind(3, 3, 1), Kind(4, 3, 2), Kind(9, 12, 8)
_MAX_POOL, _AVERAGE_POOL, _PAD, _PADV2 = Kind(17, 2, 5), Kind(1, 1, 5), Kind(34, 2), Kind(60, 2)
_SAME, _VALID, _NONE = np.int8(0), np.int8(1), np.int8(0)


def conv(graph: Graph, node: Any) -> None:
    """Convert a two-dimensional convolution, or one per channel."""
    x, settings = node.input[0], attributes(node)
    shape = graph.weights[node.input[1]].codes.shape if node.input[1] in graph.weights else graph.shape(node.input[1])
    if len(shape) != 4:
        raise unsupported(node, f"a convolution over {len(shape) - 2} dimensions")
    groups, channels = settings.get("group", 1), graph.shape(x)[1]
    depthwise = groups > 1 and groups == channels
    kind, order, axis = (_DEPTHWISE, (1, 2, 3, 0), 3) if depthwise else (_CONV, (0, 2, 3, 1), 0)
    result = fused(graph, node)
    integer = result is not None and graph.has_codes(x) and node.input[1] in graph.weights
    names = x, node.input[1], node.input[2] if len(node.input) > 2 else ""
    operands, activation, out = _operands(graph, node, names, result if integer else None, order, axis)
    windows = settings["kernel_shape"], settings["strides"], settings["dilations"]
    source, padding = _padded(graph, x, integer, settings["pads"], *windows)
    strides, dilations = (list(map(np.int32, reversed(windows[index]))) for index in (1, 2))  # width first
    options: dict[int, Any] = {0: padding, 1: strides[0], 2: strides[1]}
    if depthwise:
        options |= {3: np.int32(shape[0] // groups), 4: activation, 5: dilations[0], 6: dilations[1]}
    else:
        options |= {3: activation, 4: dilations[0], 5: dilations[1]}
    graph.emit(kind, [source, *operands], out(), options)


def linear(graph: Graph, node: Any) -> None:
    """Convert a product with a weight ``[out, in]``, and the bias that is added to it."""
    x, weight, order, end = node.input[0], node.input[1], (0, 1), node
    if node.op_type == "Gemm":
        settings = attributes(node)
        if settings.get("transA", 0) or not settings.get("transB", 0) or settings.get("alpha", 1.0) != 1.0:
            raise unsupported(node, "this form of Gemm")
        bias = node.input[2] if len(node.input) > 2 else ""
    else:
        if weight not in graph.weights and weight not in graph.constants:
            raise unsupported(node, "a product of two activations")
        order = (0, 1) if weight in graph.weights else (1, 0)
        bias, end = _added(graph, node)
    result = fused(graph, end)
    integer = result is not None and graph.has_codes(x) and weight in graph.weights
    operands, activation, out = _operands(graph, end, (x, weight, bias), result if integer else None, order, 0)
    source = graph.codes(x, False) if integer else graph.float(x, False)
    graph.emit(
        _LINEAR, [source, *operands], out(), {0: activation, 1: np.int8(0), 2: np.bool_(True), 3: np.bool_(False)}
    )


def _added(graph: Graph, node: Any) -> tuple[str, Any]:
    """The constant vector that is added to a product, or "", and the node whose result is the layer's output."""
    reader = graph.reader(node.output[0])
    if reader is not None and reader.op_type == "Add":
        other = next(name for name in reader.input if name != node.output[0])
        if other in graph.weights or (other in graph.constants and graph.constants[other].ndim == 1):
            graph.skipped.add(reader.output[0])
            return other, reader
    return "", node


def _operands(
    graph: Graph, node: Any, names: tuple[str, str, str], result: Fused | None, order: tuple[int, ...], axis: int
) -> tuple[list[int], np.int8, Any]:
    """Return the tensors of weight and bias, the fused activation function, and a function that adds the result.

    Args:
        graph: The graph.
        node: The node whose result is the layer's output.
        names: The input, the weight, and the bias or "".
        result: The quantized result; None for a floating-point operation.
        order: The order of the weight's dimensions in the file.
        axis: The dimension of the outputs in the file.
    """
    x, name, bias = names
    known = graph.weights.get(name)
    values = (graph.constants[name] if known is None else known.codes).transpose(order)
    last = len(order) == 4
    if known is None:
        weight = graph.constant(name, values)
    elif result is None:
        weight = graph.decoded(known.name, values, known.grid(axis))
    else:
        weight = graph.constant(known.name, values, known.grid(axis))
    integer = result is not None
    outputs = values.shape[axis]
    added = _zeros(graph, x, known, outputs, integer) if last and not bias else _bias(graph, bias, integer)
    operands = [weight, added]
    if result is None:
        return operands, _NONE, lambda: graph.new_float(node.output[0], last)
    return operands, result.activation, lambda: write_codes(graph, result, last)


def _bias(graph: Graph, name: str, integer: bool) -> int:
    """The tensor of a bias; -1 if the layer has none."""
    if not name:
        return -1
    known = graph.weights.get(name)
    if known is None:
        return graph.constant(name, graph.constants[name])
    return (
        graph.constant(known.name, known.codes, known.grid(0)) if integer else graph.constant(known.name, known.values)
    )


def _zeros(graph: Graph, x: str, weight: Weight | None, outputs: int, integer: bool) -> int:
    """The bias of a convolution without one, because LiteRT's convolutions have one."""
    if not integer or weight is None:
        return graph.constant("no_bias", np.zeros(outputs, np.float32))
    grid = weight.grid(0)
    step = Grid(grid.scales * graph.grid(x).scales, grid.zero_points)
    return graph.constant(f"{weight.name.removesuffix('weight')}no_bias", np.zeros(outputs, np.int32), step)


def _padded(
    graph: Graph, name: str, integer: bool, pads: list[int], kernel: list[int], strides: list[int], dilations: list[int]
) -> tuple[int, np.int8]:
    """Return the input of a convolution, and its padding; padding that LiteRT does not compute is an operation."""
    x = graph.codes(name, True) if integer else graph.float(name, True)
    if not any(pads):
        return x, _VALID
    if pads == _same_padding(graph.shape(name)[2:], kernel, strides, dilations):
        return x, _SAME
    return _pad(graph, x, pads), _VALID


def _pad(graph: Graph, x: int, pads: list[int], lowest: bool = False) -> int:
    """Pad images with zeros, or with the lowest value."""
    tensor = graph.content.tensors[x]
    (top, left, bottom, right), (batch, height, width, channels) = pads, tensor.shape
    shape = (
        batch,
        *(-1 if size < 0 else size + more for size, more in ((height, top + bottom), (width, left + right))),
    )
    padded = graph.add(Tensor(tensor.name.partition("#")[0], (*shape, channels), tensor.dtype, tensor.grid))
    inputs = [x, graph.numbers((0, 0), (top, bottom), (left, right), (0, 0))]
    if not lowest:
        graph.emit(_PAD, inputs, padded)
        return padded
    fill = np.full(1, -128, np.int8) if tensor.grid is not None else np.full(1, np.finfo(np.float32).min, np.float32)
    graph.emit(_PADV2, [*inputs, graph.add(Tensor("lowest", (1,), tensor.dtype, tensor.grid, fill))], padded)
    return padded


def _same_padding(sizes: tuple[int, ...], kernel: list[int], strides: list[int], dilations: list[int]) -> list[int]:
    """The padding that LiteRT calls SAME, as ONNX lists it; empty if it depends on sizes that vary."""
    before, after = [], []
    for size, window, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        if size < 0 and stride > 1:
            return []
        covered = (window - 1) * dilation + 1
        total = covered - 1 if stride == 1 else max((-(-size // stride) - 1) * stride + covered - size, 0)
        before.append(total // 2)
        after.append(total - total // 2)
    return before + after


def pool(graph: Graph, node: Any) -> None:
    """Convert max pooling of codes or values, or average pooling of values, without padding."""
    name, settings = node.input[0], attributes(node)
    kernel = settings["kernel_shape"]
    strides, dilations = settings.get("strides", [1, 1]), settings.get("dilations", [1, 1])
    if len(kernel) != 2 or any(each != 1 for each in dilations) or settings.get("ceil_mode", 0):
        raise unsupported(node, "pooling with dilation, ceil_mode, or other than over two dimensions")
    pads, sizes = settings.get("pads", [0] * 4), graph.shape(name)[2:]
    same = any(pads) and pads == _same_padding(sizes, kernel, strides, dilations)
    average = node.op_type == "AveragePool"
    if any(pads) and average:
        raise unsupported(node, "average pooling with padding")
    options: dict[int, Any] = {0: _SAME if same else _VALID, 1: np.int32(strides[1]), 2: np.int32(strides[0])}
    options |= {3: np.int32(kernel[1]), 4: np.int32(kernel[0]), 5: _NONE}
    codes = not average and graph.has_codes(name)
    x = graph.codes(name, True) if codes else graph.float(name, True)
    x = _pad(graph, x, pads, lowest=True) if any(pads) and not same else x
    if codes:
        out = graph.new_codes(node.output[0], graph.quantizer(name), graph.grid(name), True)
    else:
        out = graph.new_float(node.output[0], True)
    graph.emit(_AVERAGE_POOL if average else _MAX_POOL, [x], out, options)


OPERATORS: dict[str, Handler] = BASIC | {
    "Conv": conv,
    **dict.fromkeys(("Gemm", "MatMul"), linear),
    **dict.fromkeys(("MaxPool", "AveragePool"), pool),
}
"""Functions that convert a node, by its operator."""
