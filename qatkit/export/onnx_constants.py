"""ONNX constants for weights of layers whose inputs are not quantized.

ONNX Runtime fuses DequantizeLinear and MatMul into a kernel that quantizes the input to 8 bits, unlike training. If the
weight is instead dequantized by Cast, Sub and Mul, it is decoded when the file is loaded, and the product is exact.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

_LAYOUT = ("Transpose", "Reshape", "Cast", "Identity", "Split", "Concat", "Unsqueeze")
_PRODUCTS = ("MatMul", "LSTM", "GRU", "RNN")
_DECODING = ("Cast", "Unsqueeze", "Sub", "Gather")


def decode_when_loaded(graph_model: Any, weights: set[str]) -> None:
    """Replace the DequantizeLinear nodes of weights that are inputs of a MatMul or of a recurrent layer.

    Args:
        graph_model: The graph after constant folding.
        weights: Names of the codes, with one scale per weight or per output channel.
    """
    from onnxscript import ir

    graph = graph_model.graph
    axes = None
    for node in list(graph):
        codes = node.inputs[0].name if node.inputs and node.inputs[0] is not None else None
        if node.op_type != "DequantizeLinear" or codes not in weights or not _reaches_product(node.outputs[0]):
            continue
        _, scale, zero_point = node.inputs
        cast = [
            ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}) for value in (node.inputs[0], zero_point)
        ]
        added = [*cast]
        values = [scale, cast[1].outputs[0]]
        if len(scale.shape):
            if axes is None:
                axes = ir.Value(name="qatkit.axis", const_value=ir.tensor([1], name="qatkit.axis"))
                axes.shape, axes.dtype = ir.Shape([1]), ir.DataType.INT64
                graph.register_initializer(axes)
            rows = [ir.node("Unsqueeze", [value, axes]) for value in values]
            added += rows
            values = [row.outputs[0] for row in rows]
        centred = ir.node("Sub", [cast[0].outputs[0], values[1]])
        weight = ir.node("Mul", [centred.outputs[0], values[0]])
        added += [centred, weight]
        out = node.outputs[0]
        weight.outputs[0].name, weight.outputs[0].shape, weight.outputs[0].dtype = out.name, out.shape, out.dtype
        ir.convenience.replace_nodes_and_values(graph, node, [node], added, node.outputs, weight.outputs)


def _reaches_product(value: Any) -> bool:
    readers = [use.node for use in value.uses()]
    return any(
        node.op_type in _PRODUCTS or (node.op_type in _LAYOUT and any(map(_reaches_product, node.outputs)))
        for node in readers
    )


def all_nodes(proto: Any) -> list[Any]:
    """Return the nodes of a graph and of the bodies of its Scan nodes."""
    bodies = [attribute.g for node in proto.node for attribute in node.attribute if attribute.name == "body"]
    return [*proto.node, *(node for body in bodies for node in all_nodes(body))]


def decoding_nodes(proto: Any, constants: Collection[str]) -> dict[tuple[str, ...], list[Any]]:
    """Return the nodes that decode each weight, in order, keyed by the names of its codes, scale and zero point.

    The nodes of an embedding first gather rows, and have the row indices as an additional input.

    Args:
        proto: A graph read from a file.
        constants: Names of its initializers.
    """
    every = all_nodes(proto)
    makers = {output: node for node in every for output in node.output}
    found: dict[tuple[str, ...], list[Any]] = {}
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
    return found


def _leaves(node: Any, makers: dict[str, Any], nodes: list[Any]) -> set[str]:
    """The values that a node, and the decoding nodes before it, read but do not make; the nodes are appended."""
    leaves: set[str] = set()
    for index, name in enumerate(node.input):
        maker = makers.get(name)
        is_index = node.op_type == "Gather" and index == 1
        decodes = maker is not None and maker.op_type in _DECODING and not is_index
        leaves |= _leaves(maker, makers, nodes) if decodes else {name}
    nodes.append(node)
    return leaves
