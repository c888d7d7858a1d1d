"""Explain why OpenVINO computes a matrix product in floating point."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

PRODUCTS = ("MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")
RECURRENT = ("LSTMSequence", "GRUSequence", "RNNSequence", "LSTMCell", "GRUCell", "RNNCell")
_DECODING = ("Convert", "Subtract", "Multiply", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Broadcast")
_PASS = (*_DECODING, "MaxPool")


def float_reasons(read: Any, kernels: Iterable[Sequence[str]]) -> dict[str, list[str]]:
    """Return the layers whose products run in floating point, by reason.

    Args:
        read: The model that OpenVINO's reader has returned.
        kernels: The original names of the operations that each floating-point kernel computes.

    Returns:
        Names of layers, or of operations that belong to no layer, such as ``{"the input is not quantized": ["head"]}``.
    """
    operations = {node.get_friendly_name(): node for node in read.get_ordered_ops()}
    found: dict[str, list[str]] = {}
    for names in kernels:
        computed = [operations[name] for name in names if name in operations]
        products = [product for node in computed if (product := _product(node)) is not None]
        recurrent = [node.get_friendly_name() for node in computed if _kind(node) in RECURRENT]
        if products:
            name, reason = _reason(products[0])
        elif recurrent:
            name, reason = recurrent[0], "OpenVINO has no integer kernel for recurrence"
        else:
            name, reason = names[0] if names else "unknown", "OpenVINO fused several operations into it"
        found.setdefault(reason, []).append(name)
    return found


def _reason(node: Any) -> tuple[str, str]:
    """The layer of a product, and why it runs in floating point."""
    data, weight = (value.get_node() for value in node.input_values())
    constants = _constants(weight)
    if constants is None:
        return node.get_friendly_name(), "it is a product of two activations that are not both quantized"
    codes = next((each for each in constants if each.get_friendly_name().endswith(".codes")), None)
    name = _layer(codes or constants[0]) or _layer_of_bias(node) or node.get_friendly_name()
    if codes is None:
        return name, "the weight is not quantized"
    if not _is_quantized(data):
        return name, "the input is not quantized"
    if "u" in codes.get_element_type().get_type_name():
        return name, "the weight is not symmetric and signed"
    return name, "OpenVINO has no integer kernel for these shapes and types"


def _layer(constant: Any) -> str:
    """The layer of a weight, by the name of its constant; empty if that is not a layer's name."""
    name = str(constant.get_friendly_name())
    for suffix in (".weight.codes", ".weight"):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return ""


def _layer_of_bias(node: Any) -> str:
    """The layer of a product, by the name of the bias that is added to it; a transposed weight has no name."""
    for target in node.output(0).get_target_inputs():
        reader = target.get_node()
        leaves = [leaf for value in reader.input_values() for leaf in _constants(value.get_node()) or []]
        names = [str(leaf.get_friendly_name()) for leaf in leaves]
        if _kind(reader) == "Add" and (biases := [name for name in names if name.endswith(".bias")]):
            return biases[0].removesuffix(".bias")
    return ""


def _product(node: Any) -> Any:
    """The first product upstream of a node, through operations with one operand that is not constant, or None."""
    while _kind(node) not in PRODUCTS:
        computed = [value.get_node() for value in node.input_values() if _constants(value.get_node()) is None]
        if len(computed) != 1 or _kind(computed[0]) == "Parameter":
            return None
        node = computed[0]
    return node


def _constants(node: Any) -> list[Any] | None:
    """The constants that a value is decoded from; None if it depends on an input of the model."""
    if _kind(node) == "Constant":
        return [node]
    if _kind(node) not in _DECODING:
        return None
    found = []
    for value in node.input_values():
        leaves = _constants(value.get_node())
        if leaves is None:
            return None
        found += leaves
    return found


def _is_quantized(node: Any) -> bool:
    """Whether a value is decoded from the result of a FakeQuantize node."""
    while _kind(node) in _PASS:
        node = node.input_value(0).get_node()
    return _kind(node) == "FakeQuantize"


def _kind(node: Any) -> str:
    return str(node.get_type_name())
