"""Compare the packed weights of an ONNX file to the model's: unpacked by `onnx`, and decoded by ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatkit.export.differences import differences
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import FakeQuantize

_CONSTANTS = {"MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3)}
"""The positions of codes, scales and zero points among the inputs of each kind of node."""
_DATA = {"MatMulNBits": 0, "GatherBlockQuantized": 1}
"""The position of the input."""

Node = Any
Array = np.ndarray[Any, Any]


def packed_readers(proto: Any) -> dict[str, list[Node]]:
    """Return the nodes that read packed weights, by the name of the codes."""
    found: dict[str, list[Node]] = {}
    for node in proto.graph.node:
        if node.op_type in _CONSTANTS:
            found.setdefault(node.input[_CONSTANTS[node.op_type][0]], []).append(node)
    return found


def check_packed(proto: Any, nodes: list[Node], name: str, layer: QATLayer, fake_quant: FakeQuantize) -> list[str]:
    """Compare the codes, scales and zero points of one layer to the model's, with ``==``, and decode the weight.

    The nodes must also read the layer's bias, whose values `qatkit.export.onnx.weights` compares.

    Args:
        proto: The file.
        nodes: The nodes that read the layer's codes; several, if the model calls the layer more than once.
        name: The layer's name.
        layer: The model's layer.
        fake_quant: The fake quantizer of its weight.
    """
    failures: list[str] = []
    for node in nodes:
        try:
            failures += _Weight(proto, node, name).check(layer, fake_quant)
        except Exception as error:  # numpy's, onnx's and onnxruntime's exceptions share no base class
            failures.append(f"layer '{name}': the weight of {node.op_type} cannot be read: {error}")
    return list(dict.fromkeys(failures))


class _Weight:
    """The constants of one node, unpacked."""

    def __init__(self, proto: Any, node: Node, name: str) -> None:
        from onnx import numpy_helper

        self.proto, self.node, self.name = proto, node, name
        self.tensors = {tensor.name: tensor for tensor in proto.graph.initializer if tensor.name in node.input}
        self.attributes = {attribute.name: attribute.i for attribute in node.attribute}
        self.bits, self.block = self.attributes["bits"], self.attributes["block_size"]
        self.scale: Array = numpy_helper.to_array(self.tensors[node.input[2]])

    def check(self, layer: QATLayer, fake_quant: FakeQuantize) -> list[str]:
        spec, node = fake_quant.spec, self.node
        prefix = f"{self.name}." if self.name else ""
        parts = ("codes", "scale") if spec.symmetric else ("codes", "scale", "zero_point")
        keys = [f"{prefix}weight.{part}" for part in parts]
        read = [node.input[at] for at in _CONSTANTS[node.op_type] if at < len(node.input) and node.input[at]]
        if read != keys:
            return [f"layer '{self.name}': its node reads {', '.join(read)}, not {', '.join(keys)}"]
        if node.op_type == "MatMulNBits":
            order, added = [*node.input[4:], "", ""][:2]
            bias = "" if getattr(layer, "bias", None) is None else f"{prefix}bias"
            if order or added != bias:
                return [
                    f"layer '{self.name}': its node has the input order '{order}' and the bias '{added}' instead of "
                    f"'' and '{bias}'"
                ]
        level = 0 if layer.input_fake_quant is None else 4
        if self.attributes.get("accuracy_level", 0) != level:
            found = self.attributes.get("accuracy_level", 0)
            return [f"layer '{self.name}': its node has accuracy level {found}, but it was trained for level {level}"]
        scale, zero_point = fake_quant.qparams(layer.matrix)
        outputs, inputs = layer.matrix.shape
        middle = 2 ** (self.bits - 1) if spec.symmetric else 0
        blocks = -(-inputs // self.block)
        codes = self._unpacked(keys[0], outputs)[:, :inputs].astype(np.int16) - middle
        failures = differences(self._what("codes"), codes, quantize(layer.matrix, scale, zero_point, spec))
        failures += differences(self._what("scales"), self.scale, _per_block(scale, outputs, inputs, self.block))
        if not spec.symmetric:
            points = self._unpacked(keys[2], outputs)[:, :blocks]
            expected = _per_block(zero_point, outputs, inputs, self.block)
            failures += differences(self._what("zero points"), points, expected)
        return failures + differences(
            f"layer '{self.name}': weights as the runtime decodes them",
            self._decoded(outputs, inputs),
            fake_quant(layer.matrix),
        )

    def _what(self, part: str) -> str:
        return f"layer '{self.name}': {part} of the weight"

    def _unpacked(self, key: str, outputs: int) -> Array:
        """The integers ``[out, ...]`` of a tensor of bytes, unpacked by `onnx` as one of 2-bit or 4-bit integers."""
        from onnx import TensorProto, numpy_helper

        tensor = TensorProto()
        tensor.CopyFrom(self.tensors[key])
        data = numpy_helper.to_array(tensor)
        if self.bits < 8:
            rows = data.reshape(len(data), -1)
            tensor = TensorProto(
                dims=[rows.shape[0], rows.shape[1] * 8 // self.bits],
                data_type=getattr(TensorProto, f"UINT{self.bits}"),
                raw_data=rows.tobytes(),
            )
            data = numpy_helper.to_array(tensor)
        return data.reshape(outputs, -1)

    def _decoded(self, outputs: int, inputs: int) -> Array:
        """The weight ``[out, in]`` from the file's node: its product with the unit matrix, or all rows."""
        import onnxruntime
        from onnx import NodeProto, TensorProto, helper

        node = NodeProto()
        node.CopyFrom(self.node)
        del node.input[4:]
        for attribute in node.attribute:
            attribute.i = 0 if attribute.name == "accuracy_level" else attribute.i
        gathers = node.op_type == "GatherBlockQuantized"
        data = np.arange(outputs) if gathers else np.eye(inputs, dtype=np.float32)
        node.input[_DATA[node.op_type]] = "data"
        kind = TensorProto.INT64 if gathers else TensorProto.FLOAT
        graph = helper.make_graph(
            [node],
            "decode",
            [helper.make_tensor_value_info("data", kind, data.shape)],
            [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)],
            list(self.tensors.values()),
        )
        single = helper.make_model(graph, opset_imports=self.proto.opset_import, ir_version=self.proto.ir_version)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(single.SerializeToString(), options, providers=["CPUExecutionProvider"])
        decoded: Array = session.run(None, {"data": data})[0]
        return decoded if gathers else decoded.T


def _per_block(values: Tensor, outputs: int, inputs: int, block: int) -> Tensor:
    """The value of every block's first input, ``[out, blocks]``, from ``[1]``, ``[out, 1]`` or ``[out, groups]``."""
    rows = values.reshape(-1, values.shape[-1])
    columns = torch.arange(0, inputs, block) * rows.shape[1] // inputs
    return rows.expand(outputs, -1)[:, columns]
