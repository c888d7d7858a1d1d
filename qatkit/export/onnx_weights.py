"""The integers in an ONNX file against the model they came from: read by the `onnx` library, decoded by the runtime.

Nothing of the exporter is used here but the names that it promises.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.prepare import qat_layers
from qatkit.quantization.slices import value_range


@torch.no_grad()
def compare_onnx_weights(model: nn.Module, path: Path) -> tuple[int, list[str]]:
    """Compare every code, scale, zero point and bias in an ONNX file with a model's own.

    A scale may differ only where all its codes stand for zero, since it changes nothing there.

    Args:
        model: On the CPU, plain or prepared and calibrated.
        path: The ``.onnx`` file.

    Returns:
        How many codes were compared, and what differs, in words.

    Raises:
        QatkitError: onnx or onnxruntime is not installed.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise QatkitError(f"reading ONNX files needs {error.name}: pip install 'qatkit[onnx]'") from error
    try:
        file = _File(onnx.load(path))
    except Exception as error:  # protobuf's and onnx's exceptions share no base class
        return 0, [f"{path.name} is not an ONNX file: {error}"]
    compared, failures, names = 0, [], set()
    for name, layer in qat_layers(model):
        prefix = f"{name}." if name else ""
        if layer.weight_fake_quant is not None:
            names.add(f"{prefix}weight.codes")
            compared += layer.weight.numel()
            failures += file.check_weight(name, prefix, layer, layer.weight_fake_quant)
        if layer.input_fake_quant is not None:
            failures += file.check_input(name, prefix, layer.input_fake_quant)
        failures += file.check_bias(name, prefix, layer)
    for extra in sorted(key for key in file.tensors if key.endswith("weight.codes") and key not in names):
        failures.append(f"'{extra}' is in the file, but the model quantizes no such layer")
    return compared, failures


class _File:
    """An ONNX file's constants, and its quantizing nodes by the tensors they read."""

    def __init__(self, proto: Any) -> None:
        from onnx import numpy_helper

        self.proto = proto
        self.tensors: dict[str, np.ndarray[Any, Any]] = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer
        }
        nodes = [node for node in proto.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        self.decoders = {tuple(node.input): node for node in nodes if node.op_type == "DequantizeLinear"}
        self.encoders = {tuple(node.input)[1:] for node in nodes if node.op_type == "QuantizeLinear"}

    def check_weight(self, name: str, prefix: str, layer: QATLayer, fake_quant: FakeQuantize) -> list[str]:
        spec = fake_quant.spec
        scale, zero_point = fake_quant.qparams(layer.weight)
        codes = quantize(layer.weight, scale, zero_point, spec)
        used = layer.fake_quantized_weight()
        keys = tuple(f"{prefix}weight.{part}" for part in ("codes", "scale", "zero_point"))
        failures = self._compare(f"layer '{name}': codes of the weight", keys[0], codes)
        low, high = value_range(used, spec)
        stored = self.tensors.get(keys[1])
        if stored is not None and stored.size == scale.numel():
            free = (low == 0) & (high == 0)
            scale = torch.where(free, torch.from_numpy(stored.copy()).view(scale.shape), scale)
        failures += self._compare(f"layer '{name}': scales of the weight", keys[1], scale)
        failures += self._compare(f"layer '{name}': zero points of the weight", keys[2], zero_point)
        if any(key not in self.tensors for key in keys):
            return failures
        if keys not in self.decoders:
            return [*failures, f"layer '{name}': no DequantizeLinear reads the codes with their scale and zero point"]
        try:
            decoded = self._decode(keys)
        except Exception as error:  # onnxruntime's exceptions share no base class
            return [*failures, f"layer '{name}': the runtime cannot decode the weight: {error}"]
        return failures + _differences(f"layer '{name}': weights as the runtime decodes them", decoded, used)

    def check_input(self, name: str, prefix: str, fake_quant: FakeQuantize) -> list[str]:
        scale, zero_point = fake_quant.qparams(torch.empty(0))
        keys = (f"{prefix}input.scale", f"{prefix}input.zero_point")
        failures = self._compare(f"layer '{name}': scale of the input", keys[0], scale)
        failures += self._compare(f"layer '{name}': zero point of the input", keys[1], zero_point)
        decoders = {keys_read[1:] for keys_read in self.decoders}
        if not failures and not (keys in self.encoders and keys in decoders):
            failures.append(f"layer '{name}': nothing in the graph rounds the input with its scale and zero point")
        return failures

    def check_bias(self, name: str, prefix: str, layer: QATLayer) -> list[str]:
        bias = layer.operands(torch.zeros(1))[2]
        codes, scale = (self.tensors.get(f"{prefix}bias.{part}") for part in ("codes", "scale"))
        what = f"layer '{name}': the bias"
        if bias is None:
            return [] if codes is None and f"{prefix}bias" not in self.tensors else [f"{what}: the model has none"]
        if codes is None:
            stored = self.tensors.get(f"{prefix}bias")
            return _differences(what, stored if stored is None else stored.reshape(-1), bias)
        weight_scale, input_scale = (self.tensors.get(f"{prefix}{part}.scale") for part in ("weight", "input"))
        if scale is None or weight_scale is None or input_scale is None:
            return [f"{what}: its scale, or one of the two it is the product of, is not in the file"]
        if codes.shape != tuple(bias.shape) or codes.dtype != np.int32:
            return [f"{what}: {codes.dtype} of shape {list(codes.shape)} in the file, not int32 {list(bias.shape)}"]
        product = torch.from_numpy(np.asarray(weight_scale * input_scale)).reshape(scale.shape)
        failures = _differences(f"{what}'s scale, against weight scale x input scale", scale, product)
        step = np.broadcast_to(scale.astype(np.float64), codes.shape)
        value = bias.double().numpy()
        wrong = np.abs(codes * step - value) > 2.0**-22 * np.abs(value)  # what float32 loses in two roundings
        if wrong.any():
            first = int(wrong.nonzero()[0][0])
            failures.append(
                f"{what}: {int(wrong.sum())} of {wrong.size} codes stand for another value, the first at [{first}]: "
                f"{codes[first]} x {step[first]:.6g} = {codes[first] * step[first]:.6g} in the file, "
                f"{value[first]:.6g} in the model"
            )
        return failures

    def _compare(self, what: str, key: str, expected: Tensor) -> list[str]:
        found = self.tensors.get(key)
        if found is not None and found.size == expected.numel() and not key.endswith("codes"):
            found = found.reshape(expected.shape)  # scales have no trailing dimensions of size 1 in ONNX
        return _differences(what, found, expected)

    def _decode(self, keys: tuple[str, ...]) -> np.ndarray[Any, Any]:
        """What ONNX Runtime's DequantizeLinear makes of one weight: the file's own node, alone in a graph."""
        import onnxruntime
        from onnx import TensorProto, helper

        node = self.decoders[keys]
        graph = helper.make_graph(
            [node],
            "decode",
            [],
            [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)],
            [tensor for tensor in self.proto.graph.initializer if tensor.name in keys],
        )
        alone = helper.make_model(graph, opset_imports=self.proto.opset_import, ir_version=self.proto.ir_version)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(alone.SerializeToString(), options, providers=["CPUExecutionProvider"])
        decoded: np.ndarray[Any, Any] = session.run(None, {})[0]
        return decoded


def _differences(what: str, found: np.ndarray[Any, Any] | None, expected: Tensor) -> list[str]:
    if found is None:
        return [f"{what}: not in the file"]
    if found.shape != tuple(expected.shape):
        return [f"{what}: shape {list(found.shape)} in the file, {list(expected.shape)} in the model"]
    model = expected.numpy()
    wrong = found.astype(np.float64) != model.astype(np.float64)
    if not wrong.any():
        return []
    first = tuple(int(axis[0]) for axis in np.atleast_1d(wrong).nonzero())
    pair = np.atleast_1d(found)[first], np.atleast_1d(model)[first]
    return [
        f"{what}: {int(wrong.sum())} of {wrong.size} differ, the first at {list(first)}: "
        f"{pair[0]} in the file, {pair[1]} in the model"
    ]
