"""Explain why ONNX Runtime computes a matrix product in floating point."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qatkit.export.onnx.constants import all_nodes

_NO_INTEGER_KERNEL = {"ConvTranspose": "transposed convolutions", **dict.fromkeys(("LSTM", "GRU", "RNN"), "recurrence")}
_PRODUCTS = ("Conv", "Gemm", "MatMul", *_NO_INTEGER_KERNEL)
_INTEGER_TYPES = (2, 3, 6, 21, 22)  # uint8, int8, int32, uint4, int4
_PASS = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Cast", "Identity")


def float_reasons(path: Path, nodes: Iterable[Any]) -> dict[str, list[str]]:
    """Return the layers whose products run in floating point, by reason.

    Args:
        path: The exported ``.onnx`` file.
        nodes: The floating-point matrix products in the graph that ONNX Runtime derived from the file.

    Returns:
        Names of layers, or of nodes that belong to no layer, such as ``{"the input is not quantized": ["head"]}``.
    """
    import onnx

    graph = _Graph(onnx.load(path, load_external_data=False).graph)
    found: dict[str, list[str]] = {}
    for node in nodes:
        name, reason = graph.reason(node)
        found.setdefault(reason, []).append(name)
    return found


class _Graph:
    """The nodes of a file, by the values that they compute and read."""

    def __init__(self, graph: Any) -> None:
        nodes = list(all_nodes(graph))
        self.names = {node.name: node for node in nodes}
        self.producers = {name: node for node in nodes for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        # the constants that a value is computed from; none for values that depend on an input of the model
        self.leaves = {name: [name] for name in self.constants}
        for node in nodes:  # a file lists nodes in the order of their computation
            found = [self.leaves.get(name) for name in node.input if name]
            if None not in found:
                leaves = [leaf for each in found for leaf in each or ()]
                self.leaves |= dict.fromkeys(node.output, leaves)

    def reason(self, optimized: Any) -> tuple[str, str]:
        """The layer of a node of the optimized graph, and why it runs in floating point."""
        node = self._origin(optimized)
        if node is None:
            return optimized.name, "ONNX Runtime fused several nodes into it"
        data, weight = node.input[0], self._constant(node.input[1])
        if weight is None:
            return node.name, "it is a product of two activations that are not both quantized"
        name = self._layer(node, weight.name)
        if weight.data_type not in _INTEGER_TYPES:
            return name, "the weight is not quantized"
        if (kind := _NO_INTEGER_KERNEL.get(node.op_type)) is not None:
            return name, f"ONNX Runtime has no integer kernel for {kind}"
        if not self._is_quantized(data):
            return name, "the input is not quantized"
        if self._is_grouped(node.input[1]):
            return name, "the weight has one scale per group"
        if readers := self._read_in_floating_point(node.output[0]):
            return name, f"the output is not quantized, because {readers} reads it"
        return name, "ONNX Runtime has no integer kernel for these shapes and types"

    def _layer(self, node: Any, weight: str) -> str:
        """The layer of a product: its weight has the layer's name, or its bias has, if the weight was transposed."""
        biases = [name for each in self.readers.get(node.output[0], []) if each.op_type == "Add" for name in each.input]
        named = [name.removesuffix(".codes") for name in (weight, *biases) if "." in name and name in self.constants]
        return named[0].rsplit(".", 1)[0] if named else str(node.name)

    def _origin(self, optimized: Any) -> Any:
        """The product in the file that a node of the optimized graph stands for; None if it is unknown.

        ONNX Runtime keeps the name of the product or of the last value that a fused node computes, with a prefix or
        suffix.
        """
        words = optimized.name.replace("/", " ").split()
        for name in (word for word in words if word in self.names):
            if self.names[name].op_type in _PRODUCTS:
                return self.names[name]
        values = [*(word.removesuffix("_nchwc") for word in words), *optimized.output]
        return next((found for name in values if (found := self._product(name)) is not None), None)

    def _product(self, name: str) -> Any:
        """The first product upstream of a value, through operations with one operand that is not constant."""
        node = self.producers.get(name)
        while node is not None and node.op_type not in _PRODUCTS:
            computed = [each for each in node.input if each in self.producers and self._constant(each) is None]
            if len(computed) != 1:
                return None
            node = self.producers[computed[0]]
        return node

    def _constant(self, name: str) -> Any:
        """The constant that a value is decoded from, codes before scales; None if the value depends on an input."""
        leaves = self.leaves.get(name)
        if not leaves:
            return None
        return self.constants[next((leaf for leaf in leaves if leaf.endswith(".codes")), leaves[0])]

    def _is_quantized(self, name: str) -> bool:
        node = self.producers.get(name)
        while node is not None and node.op_type in (*_PASS, "MaxPool"):
            node = self.producers.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    def _is_grouped(self, name: str) -> bool:
        node = self.producers.get(name)
        while node is not None and node.op_type != "DequantizeLinear":
            node = self.producers.get(node.input[0])
        return node is not None and any(attribute.name == "block_size" for attribute in node.attribute)

    def _read_in_floating_point(self, name: str) -> str:
        """The operations that read a value and are no QuantizeLinear; "" if there are none."""
        readers = self.readers.get(name, [])
        while len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
            name = readers[0].output[0]
            readers = self.readers.get(name, [])
        kinds = [node.op_type for node in readers if node.op_type != "QuantizeLinear"]
        if name in self.outputs:
            kinds.append("the model's output")
        return " and ".join(dict.fromkeys(kinds))
