"""Compare the constants of an OpenVINO model to the trained model's.

They are read and decoded by OpenVINO. As in `qatkit.export.onnx.weights`, constants are found by their documented names
(``{layer}.weight.codes`` and so on).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from qatkit.export.onnx.weights import Comparison, OnnxFile, compare_file
from qatkit.export.openvino.runtime import evaluate
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import FakeQuantize

_LAYOUT = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Convert", "Broadcast")
"""Operators that change the layout or dtype of their first operand, not its values."""
_DECODING = (*_LAYOUT, "Subtract", "Multiply")
_CLIPPING = ("Clamp", "Maximum", "Minimum")
_PRODUCTS = ("MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")


@torch.no_grad()
def compare_openvino_weights(model: nn.Module, read: Any) -> Comparison:
    """Compare every code, scale, zero point and bias of an OpenVINO model, and other parameters by name.

    Args:
        model: The trained model on the CPU, plain or prepared and calibrated.
        read: The model that OpenVINO's reader has returned.
    """
    return compare_file(model, OpenVINOFile(read))


class OpenVINOFile(OnnxFile):
    """The constants of an OpenVINO model, and its nodes that quantize and decode, by the names of the constants."""

    def __init__(self, read: Any) -> None:
        self.read = read
        self.outputs = {name for value in read.outputs for name in value.names}
        nodes = list(read.get_ordered_ops())
        self.tensors = {node.get_friendly_name(): _values(node) for node in nodes if _kind(node) == "Constant"}
        self.packed = {}
        self.products, self.recurrent = {}, {}
        self.decoders: dict[tuple[str, ...], list[Any]] = {}
        self.quantizers: dict[tuple[str, ...], list[Any]] = {}
        for node in nodes:
            if _kind(node) == "Multiply":
                self._add(node)

    def _add(self, node: Any) -> None:
        """Note a node that multiplies codes by their scale."""
        names, others = _leaves(node, (*_DECODING, *_CLIPPING, "Gather"))
        scales = [name for name in names if name.endswith(".scale")]
        zero_points = [name for name in names if name.endswith(".zero_point")]
        codes = next((name for name in names if name.endswith("weight.codes")), None)
        if len(scales) != 1 or len(zero_points) > 1:
            return
        rounded = [other for other in others if _kind(other) == "FakeQuantize"]
        if codes is not None and not others:
            zero_point = f"{codes.removesuffix('codes')}zero_point"
            self.decoders.setdefault((codes, scales[0], *(zero_points or [zero_point])), []).append(node)
        elif codes is None and rounded:
            self.quantizers.setdefault((scales[0], *zero_points), []).extend(rounded)

    def check_quantizer(self, what: str, prefix: str, fake_quant: FakeQuantize) -> list[str]:
        """Compare the scale and zero point of an activation, and the range of the nodes that round it."""
        scale, zero_point = fake_quant.qparams(torch.empty(0))
        keys = (f"{prefix}.scale", f"{prefix}.zero_point")
        failures = self._compare(f"{what}: scale", keys[0], scale)
        failures += self._compare(f"{what}: zero point", keys[1], zero_point)
        if failures:
            return failures
        if not (nodes := self.quantizers.get(keys)):
            return [f"{what}: no FakeQuantize node is decoded with its scale and zero point"]
        low, high = (-128, 127) if fake_quant.spec.symmetric else (0, 255)
        values = [np.float32(code - int(zero_point)) * np.float32(scale.item()) for code in (low, high)]
        expected = [*map(float, values), float(low), float(high)]
        for node in nodes:
            found = [float(evaluate(each).item()) for each in _operands(node)[1:]]
            if found != expected or node.get_attributes()["levels"] != 256:
                failures.append(f"{what}: the FakeQuantize node maps the range {found} in the file, not {expected}")
        return failures

    def check_dynamic(self, name: str, prefix: str) -> list[str]:
        """Dynamic inputs are not exported."""
        return [f"layer '{name}': input: the format does not support dynamic quantization"]

    def check_bias(self, name: str, prefix: str, layer: QATLayer, grid: str) -> list[str]:
        """Compare a bias; a node must add its codes, if it has any."""
        failures = super().check_bias(name, prefix, layer, grid)
        parts = {f"{prefix}bias.codes", f"{prefix}bias.scale"}
        if not failures and parts <= self.tensors.keys():
            for product in self._outputs_of(prefix):
                if not any(parts <= _leaves(added)[0] for added in _constants_added(product)):
                    failures.append(f"layer '{name}': the bias: no node adds its codes, decoded with their scale")
        return failures

    def _outputs_of(self, prefix: str) -> list[Any]:
        """The products of a layer's weight."""
        decoders = [
            node for keys, nodes in self.decoders.items() if keys[0] == f"{prefix}weight.codes" for node in nodes
        ]
        readers = [reader for node in decoders for reader in _readers(node, _LAYOUT)]
        return [reader for reader in readers if _kind(reader) in _PRODUCTS]

    def _added_to(self, output: Any, size: int) -> np.ndarray[Any, Any] | None:
        for added in _constants_added(output):
            while _kind(added) in _LAYOUT:
                added = _operands(added)[0]
            value = evaluate(added)
            if value.size in (1, size):  # a bias of zeros becomes a single one
                return np.broadcast_to(value.reshape(-1), size)
        return None

    def _decode(self, keys: tuple[str, ...]) -> np.ndarray[Any, Any]:
        """Decode one weight with OpenVINO; the nodes of an embedding are asked for every row."""
        shape = self.tensors[keys[0]].shape  # groups have an axis of their own until a node removes it
        values = [self._decoded(node, shape[0]).reshape(shape) for node in self.decoders[keys]]
        return next((value for value in values if not np.array_equal(value, values[0])), values[0])

    def _decoded(self, node: Any, rows: int) -> np.ndarray[Any, Any]:
        from openvino import opset13

        if not any(_kind(each) == "Gather" for each in _upstream(node, (*_DECODING, "Gather"))):
            return evaluate(node)
        copy = {each.get_friendly_name(): each for each in self.read.clone().get_ordered_ops()}
        node = copy[node.get_friendly_name()]
        every = opset13.constant(np.arange(rows))
        for each in list(_upstream(node, (*_DECODING, "Gather"))):
            if _kind(each) == "Gather":
                each.input(1).replace_source_output(every.output(0))
        return evaluate(node)


def _values(constant: Any) -> np.ndarray[Any, Any]:
    """The values of a constant; OpenVINO returns two integers of 4 bits in one byte, unless they are converted."""
    values: np.ndarray[Any, Any] = constant.data
    if constant.get_element_type().bitwidth >= 8:
        return values
    signed = constant.get_element_type().get_type_name() == "i4"
    return cast("np.ndarray[Any, Any]", constant.get_data(dtype=np.float32)).astype(np.int8 if signed else np.uint8)


def _kind(node: Any) -> str:
    kind: str = node.get_type_name()
    return kind


def _operands(node: Any) -> list[Any]:
    return [value.get_source_output().get_node() for value in node.inputs()]


def _upstream(node: Any, through: Collection[str]) -> Iterator[Any]:
    """A node and the nodes that make its values, up to the first that `through` does not name."""
    yield node
    if _kind(node) in through:
        operands = _operands(node)
        for operand in operands[:1] if _kind(node) in (*_LAYOUT, "Gather") else operands:
            yield from _upstream(operand, through)


def _leaves(node: Any, through: Collection[str] = _DECODING) -> tuple[set[str], list[Any]]:
    """The names of the constants from which a value is made, and the other nodes."""
    ends = [each for each in _upstream(node, through) if _kind(each) not in through]
    constants = {each.get_friendly_name() for each in ends if _kind(each) == "Constant"}
    return constants, [each for each in ends if _kind(each) != "Constant"]


def _readers(node: Any, through: Collection[str]) -> Iterator[Any]:
    """The nodes that read a value, also behind nodes that `through` names."""
    for value in node.output(0).get_target_inputs():
        reader = value.get_node()
        if _kind(reader) in through:
            yield from _readers(reader, through)
        else:
            yield reader


def _constants_added(product: Any) -> Iterator[Any]:
    """The constants that are added after a product; OpenVINO's reader may put a factor of 1 before."""
    for reader in _readers(product, (*_LAYOUT, "Multiply")):
        if _kind(reader) == "Add":
            yield from (each for each in _operands(reader) if not _leaves(each)[1])
