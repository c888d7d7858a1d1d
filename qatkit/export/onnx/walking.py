"""Read the outputs of single layers of an ONNX file: they become additional outputs of a copy of its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qatkit.export.interface import LayerCall, Walk
from qatkit.export.onnx.constants import LAYOUT, PRODUCTS
from qatkit.export.onnx.runtime import Runtime, named_inputs, open_session
from qatkit.export.onnx.weights import OnnxFile
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.prepare import qat_layers, qat_weights

_UNREAD = "no node of the graph computes its output alone"


def walk(model: nn.Module, path: Path, runtime: Any) -> Walk:
    """Walk through the quantized layers of a file in a default session of ONNX Runtime.

    A value that is an output of the graph cannot be fused into an operator, so the session may choose other kernels
    than for the file itself.

    Args:
        model: The trained model, in eval mode on the CPU.
        path: The file.
        runtime: Not used: its session does not return the outputs of layers.

    Raises:
        QatkitError: ONNX Runtime cannot load the copy.
    """
    import onnx

    graph = _Graph(OnnxFile(onnx.load(path)))
    places = [(name, place) for name, layer in qat_layers(model) for place in graph.places(name, layer)]
    names = dict.fromkeys(weight.name for weight in qat_weights(model))
    skipped = {name: _UNREAD for name in names if name not in dict(places)}
    proto = onnx.load(path, load_external_data=False)
    known = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    added = {value for _, place in places for value in (place.input, place.output)} - known
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(added))
    session = open_session(path, None, content=proto.SerializeToString())
    calls: list[LayerCall] = []
    return Walk(model, _Recorder(session, added, places, calls), tuple(dict(places)), calls, skipped)


@dataclass(frozen=True)
class _Place:
    """The names of the values that a call of a layer reads and computes."""

    input: str
    output: str


class _Recorder(Runtime):
    """A loaded copy of a file that records the calls of layers."""

    def __init__(
        self, session: Any, added: set[str], places: Sequence[tuple[str, _Place]], calls: list[LayerCall]
    ) -> None:
        super().__init__(session, added)
        self._places, self._calls = places, calls

    def __call__(self, *args: Tensor, **kwargs: Tensor | None) -> Any:
        inputs = named_inputs(self.inputs, args, kwargs)
        values: Mapping[str, Tensor] = {**inputs, **self.compute(inputs)}
        self._calls[:] = [
            LayerCall(name, (values[place.input],), {}, values[place.output]) for name, place in self._places
        ]
        return self.named_outputs(values)


class _Graph:
    """The nodes of a file, by the values that they compute and read."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.makers: dict[str, Any] = {}
        self.readers: dict[str, list[Any]] = {}
        for node in file.proto.graph.node:
            self.makers |= dict.fromkeys(node.output, node)
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def places(self, name: str, layer: QATLayer) -> list[_Place]:
        """Where a layer is computed, in the order of the graph; empty if it is computed inside a larger operator."""
        codes = f"{name}.weight.codes".removeprefix(".")
        if packed := self.file.packed.get(codes):
            gathers = packed[0].op_type == "GatherBlockQuantized"
            found = [(node.input[1 if gathers else 0], node.output[0]) for node in packed]
        elif products := self.file.products.get(codes):
            found = [(self.makers[each.input[0]].input[0], each.output) for each in products]
        else:
            decoders = [nodes for keys, nodes in self.file.decoders.items() if keys[0] == codes]
            gathered = [
                (node.input[1], nodes[-1].output[0]) for nodes in decoders for node in nodes if node.op_type == "Gather"
            ]
            weights = {nodes[-1].output[0] for nodes in decoders}
            found = gathered or self._products(weights, on_grid=layer.input_on_grid)
        biased = getattr(layer, "bias", None) is not None
        return [_Place(data, self._biased(output, layer) if biased else output) for data, output in found]

    def _products(self, weights: set[str], on_grid: bool) -> list[tuple[str, str]]:
        """The data and the output of the products with a weight."""
        found = []
        for node in self.file.proto.graph.node:  # in topological order
            if node.op_type in LAYOUT and weights & set(node.input):
                weights.add(node.output[0])
            elif node.op_type in PRODUCTS and weights & set(node.input[:2]):
                data = next(each for each in node.input if each not in weights)
                found.append((data if on_grid else self._before_quantization(data), node.output[0]))
        return found

    def _before_quantization(self, name: str) -> str:
        """The value that a decoded value was quantized from; the value itself if it was not."""
        at, decoded = name, False
        while (node := self.makers.get(at)) is not None and node.op_type in ("DequantizeLinear", "Clip", *LAYOUT):
            decoded |= node.op_type == "DequantizeLinear"
            at = node.input[0]
        return node.input[0] if decoded and node is not None and node.op_type == "QuantizeLinear" else name

    def _biased(self, output: str, layer: QATLayer) -> str:
        """The sum of a product and its bias, if a node of its own adds it."""
        at = output
        while len(readers := self.readers.get(at, [])) == 1 and readers[0].op_type in LAYOUT:
            at = readers[0].output[0]
        for node in readers:
            constants = [self.file.tensors[each] for each in node.input if each in self.file.tensors]
            if node.op_type == "Add" and any(each.size == layer.matrix.shape[0] for each in constants):
                return str(node.output[0])
            dequantized = [self.makers[each] for each in node.input if each != at and each in self.makers]
            if node.op_type == "Add" and any(".bias.codes" in each.input[0] for each in dequantized if each.input):
                return str(node.output[0])
        return output
