"""ONNX constants for weights of layers whose inputs are not quantized.

ONNX Runtime runs DequantizeLinear in every call, or fuses it with MatMul into a kernel that quantizes the input to 8
bits, unlike training. If the weight is instead dequantized by Cast, Sub and Mul, it is decoded once, when the file is
loaded, and the layer is exact and as fast as in floating point.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from qatkit.spec import QuantSpec

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
LAYOUT = ("Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze")
"""Operators that change the layout of a tensor, not its values."""
_DECODING = ("Cast", "Sub", "Gather")
_SHAPE = "qatkit.shape"
"""First part of the names of constant shapes."""


def decode_when_loaded(graph_model: Any, weights: Mapping[str, QuantSpec]) -> None:
    """Replace the DequantizeLinear nodes of weights, and store codes of at most 4 bits in 4 bits.

    Args:
        graph_model: The graph after constant folding.
        weights: Quantization of weights by the name of their codes.
    """
    from onnxscript import ir

    graph = graph_model.graph
    for node in list(graph):
        codes = node.inputs[0] if node.inputs else None
        if node.op_type != "DequantizeLinear" or codes is None or codes.name not in weights:
            continue
        added: list[Any] = []

        def add(kind: str, *inputs: Any, added: list[Any] = added, **attributes: Any) -> Any:
            added.append(ir.node(kind, list(inputs), attributes=attributes))
            return added[-1].outputs[0]

        spec = weights[codes.name]
        shape = codes.shape.numpy()
        _, scale, zero_point = node.inputs
        values, point = (add("Cast", value, to=ir.DataType.FLOAT) for value in (codes, zero_point))
        if spec.num_bits <= 4 and codes.dtype in (ir.DataType.INT8, ir.DataType.UINT8):
            _store_in_4_bits(codes)
        if (size := spec.group_size) is not None:
            values = add("Reshape", values, _shape(graph, [shape[0], shape[1] // size, size]))
        if len(scale.shape):
            aligned = [*scale.shape.numpy(), *[1] * (len(shape) + (size is not None) - len(scale.shape))]
            scale, point = (add("Reshape", value, _shape(graph, aligned)) for value in (scale, point))
        weight = add("Mul", add("Sub", values, point), scale)
        if size is not None:
            weight = add("Reshape", weight, _shape(graph, list(shape)))
        out = node.outputs[0]
        weight.name, weight.shape, weight.dtype = out.name, out.shape, out.dtype
        ir.convenience.replace_nodes_and_values(graph, node, [node], added, node.outputs, [weight])


def _store_in_4_bits(codes: Any) -> None:
    from onnxscript import ir

    dtype = ir.DataType.INT4 if codes.dtype == ir.DataType.INT8 else ir.DataType.UINT4
    array = codes.const_value.numpy()
    codes.const_value = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=codes.name)
    codes.dtype = dtype


def _shape(graph: Any, sizes: list[int]) -> Any:
    """The constant with a shape; one for each."""
    from onnxscript import ir

    name = ".".join(map(str, [_SHAPE, *sizes]))
    if name not in graph.initializers:
        value = ir.Value(name=name, const_value=ir.tensor(sizes, dtype=ir.DataType.INT64, name=name))
        value.shape, value.dtype = ir.Shape([len(sizes)]), ir.DataType.INT64
        graph.register_initializer(value)
    return graph.initializers[name]


def all_nodes(proto: Any) -> list[Any]:
    """Return the nodes of a graph and of the bodies of its Scan nodes."""
    bodies = [attribute.g for node in proto.node for attribute in node.attribute if attribute.name == "body"]
    return [*proto.node, *(node for body in bodies for node in all_nodes(body))]


def decoding_nodes(proto: Any, constants: Collection[str]) -> dict[tuple[str, ...], list[Any]]:
    """Return the nodes that decode each weight, in order, keyed by the names of its codes, scale and zero point.

    For an embedding, the first nodes gather rows, and they take the row indices as an additional input.

    Args:
        proto: A graph read from a file.
        constants: Names of its initializers.
    """
    every = all_nodes(proto)
    makers = {output: node for node in every for output in node.output}
    found: dict[tuple[str, ...], list[Any]] = {}
    grouped: dict[str, list[Any]] = {}
    for node in every:
        if node.op_type == "DequantizeLinear":
            found[tuple(node.input)] = [node]
        elif node.op_type == "Mul":
            nodes: list[Any] = []
            leaves = _leaves(node, makers, nodes)
            codes = next((leaf for leaf in leaves if leaf.endswith("weight.codes")), None)
            gathered = {each.input[1] for each in nodes if each.op_type == "Gather"}
            if codes is not None and leaves - gathered <= set(constants) and len(gathered) < 2:
                prefix = codes.removesuffix("codes")
                found[codes, f"{prefix}scale", f"{prefix}zero_point"] = nodes
                grouped[node.output[0]] = nodes
        elif _aligns(node) and node.input[0] in grouped:
            grouped[node.input[0]].append(node)
    return found


def _aligns(node: Any) -> bool:
    """Whether `decode_when_loaded` made a node that reshapes a constant."""
    return bool(node.op_type == "Reshape" and node.input[1].startswith(_SHAPE))


def _leaves(node: Any, makers: dict[str, Any], nodes: list[Any]) -> set[str]:
    """The values that a node, and the decoding nodes before it, read but do not make; the nodes are appended."""
    leaves: set[str] = set()
    for index, name in enumerate(node.input):
        maker = makers.get(name)
        is_index = node.op_type == "Gather" and index == 1
        decodes = maker is not None and (maker.op_type in _DECODING or _aligns(maker)) and not is_index
        leaves |= _leaves(maker, makers, nodes) if decodes else {name}
    nodes.append(node)
    return leaves
