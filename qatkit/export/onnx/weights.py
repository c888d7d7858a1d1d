"""Compare the constants of an ONNX file to the model's: they are read with `onnx` and decoded by ONNX Runtime.

Verification relies only on the exporter's documented tensor names. A float bias may have a different name, because
graph optimizers fold and rename such constants. It is found in the graph as the constant added after the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qatkit.export.differences import differences
from qatkit.export.onnx.constants import LAYOUT, PRODUCTS, all_nodes, decoding_nodes
from qatkit.export.onnx.dynamic import IntegerProduct, integer_products
from qatkit.export.onnx.dynamic_recurrent import RecurrentProduct, recurrent_products
from qatkit.export.onnx.external import side_failures
from qatkit.export.onnx.folding import batch_norms, holds_a_fold
from qatkit.export.onnx.packed_weights import check_packed, packed_readers
from qatkit.export.onnx.points import points_of
from qatkit.export.onnx.qdq_parts import EXPLICIT, part_layers
from qatkit.export.onnx.recurrent import BIAS
from qatkit.export.onnx.saturation import layers_at_risk
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.layers import QATEmbedding, QATEmbeddingBag, QATLayer
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.prepare import qat_layers
from qatkit.quantization.recurrent import QATRecurrent
from qatkit.quantization.slices import value_range


@dataclass(frozen=True)
class Comparison:
    """The result of comparing the integers of an ONNX file to the model's."""

    weights: int
    """Number of codes that were compared."""
    failures: list[str]
    """Descriptions of all differences."""
    at_risk: list[str]
    """Layers for which the kernels of some processors may saturate; see `qatkit.export.onnx.saturation`."""
    one_thread: bool = False
    """Whether outputs depend on the number of threads; see `qatkit.export.onnx.dynamic_recurrent`."""


@torch.no_grad()
def compare_onnx_weights(model: nn.Module, path: Path) -> Comparison:
    """Compare every code, scale, zero point and bias in an ONNX file, and other parameters by name, to the model's.

    A scale may differ only if all its codes represent zero, because it then has no effect on the weights.

    Args:
        model: The model on the CPU, plain or prepared and calibrated.
        path: The ``.onnx`` file.

    Returns:
        The differences, and the layers for which the kernels of some processors may saturate.
    """
    import onnx

    try:
        if failures := side_failures(path):
            return Comparison(0, failures, [])
        file = OnnxFile(onnx.load(path))
    except Exception as error:  # protobuf's and onnx's exceptions share no base class
        return Comparison(0, [f"{path.name} is not an ONNX file: {error}"], [])
    return compare_file(model, file)


def compare_file(model: nn.Module, file: OnnxFile) -> Comparison:
    """Compare the constants of a file that has been read to the model's; see `compare_onnx_weights`."""
    compared, names = 0, set()
    integer: dict[str, np.ndarray[Any, Any]] = {}
    failures: list[str] = []
    points = points_of(model)
    grids = {id(fake_quant): name for name, fake_quant in points.items()}
    for name, layer in [*qat_layers(model), *part_layers(model)]:
        prefix = f"{name}." if name else ""
        if layer.weight_fake_quant is not None:
            names.add(f"{prefix}weight.codes")
            compared += layer.weight.numel()
            failures += file.check_weight(name, prefix, layer, layer.weight_fake_quant)
        if layer.input_fake_quant is not None and layer.input_fake_quant.dynamic:
            failures += file.check_dynamic(name, prefix)
        elif layer.input_fake_quant is not None and not layer.input_on_grid:
            failures += file.check_quantizer(f"layer '{name}': input", f"{prefix}input", layer.input_fake_quant)
        grid = grids[id(layer.input_fake_quant)] if layer.input_on_grid else f"{prefix}input"
        failures += file.check_bias(name, prefix, layer, grid)
        if layer.input_fake_quant is not None and (codes := file.tensors.get(f"{prefix}weight.codes")) is not None:
            integer[name] = codes
    for name, recurrent in model.named_modules():
        if type(recurrent) in EXPLICIT and isinstance(recurrent, QATRecurrent):
            failures += file.check_biases(name, recurrent)
    failures += file.check_parameters(model)
    for name, fake_quant in points.items():
        failures += file.check_quantizer(f"result '{name}'", name, fake_quant)
    for extra in sorted(key for key in file.tensors if key.endswith("weight.codes") and key not in names):
        failures.append(f"'{extra}' is in the file, but the model has no such quantized layer")
    return Comparison(compared, failures, layers_at_risk(integer), bool(file.recurrent))


class OnnxFile:
    """The constants of an ONNX file, and its nodes that quantize and decode, by the tensors that they read."""

    def __init__(self, proto: Any) -> None:
        from onnx import numpy_helper

        self.proto = proto
        self.tensors: dict[str, np.ndarray[Any, Any]] = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer
        }
        self.outputs = {value.name for value in proto.graph.output}
        self.packed = packed_readers(proto)
        self.products = integer_products(proto.graph)
        self.recurrent = recurrent_products(proto.graph)
        self.decoders = decoding_nodes(proto.graph, self.tensors)
        self.encoders = {tuple(node.input)[1:] for node in all_nodes(proto.graph) if node.op_type == "QuantizeLinear"}

    def check_weight(self, name: str, prefix: str, layer: QATLayer, fake_quant: FakeQuantize) -> list[str]:
        if nodes := self.packed.get(f"{prefix}weight.codes"):
            return check_packed(self.proto, nodes, name, layer, fake_quant)
        spec = fake_quant.spec
        matrix = layer.matrix  # [out, in, ...], as in the file
        scale, zero_point = fake_quant.qparams(matrix)
        codes = quantize(matrix, scale, zero_point, spec)
        used = fake_quant(matrix)
        read = keys = tuple(f"{prefix}weight.{part}" for part in ("codes", "scale", "zero_point"))
        stored = self.tensors.get(keys[0])
        if stored is not None and stored.dtype == np.uint8 and spec.symmetric:  # signed codes as unsigned ones
            codes, zero_point = codes.int() + 128, zero_point + 128
        failures = self._compare(f"layer '{name}': codes of the weight", keys[0], codes)
        low, high = value_range(used, spec)
        stored = self.tensors.get(keys[1])
        if stored is not None and stored.size == scale.numel():
            free = (low == 0) & (high == 0)
            scale = torch.where(free, torch.from_numpy(stored.copy()).view(scale.shape), scale)
        failures += self._compare(f"layer '{name}': scales of the weight", keys[1], scale)
        products: list[IntegerProduct | RecurrentProduct] = [
            *self.products.get(keys[0], []),
            *self.recurrent.get(keys[0], []),
        ]
        omitted = bool(products) or isinstance(layer, QATEmbedding | QATEmbeddingBag)  # where zero points are all 0
        if keys[2] in self.tensors or bool(zero_point.any()) or not omitted:
            failures += self._compare(f"layer '{name}': zero points of the weight", keys[2], zero_point)
        else:
            read = keys[:2]
        if any(key not in self.tensors for key in read):
            return failures
        if not (keys in self.decoders or products) or any(each.weight != read for each in products):
            return [*failures, f"layer '{name}': no node decodes the codes with their scale and zero point"]
        try:
            decoded = products[0].decoded(self.proto) if products else self._decode(keys)
        except Exception as error:  # onnxruntime's exceptions share no base class
            return [*failures, f"layer '{name}': the runtime cannot decode the weight: {error}"]
        return failures + differences(f"layer '{name}': weights as the runtime decodes them", decoded, used)

    def check_quantizer(self, what: str, prefix: str, fake_quant: FakeQuantize) -> list[str]:
        scale, zero_point = fake_quant.qparams(torch.empty(0))
        keys = (f"{prefix}.scale", f"{prefix}.zero_point")
        failures = self._compare(f"{what}: scale", keys[0], scale)
        failures += self._compare(f"{what}: zero point", keys[1], zero_point)
        decoders = {keys_read[1:] for keys_read in self.decoders}
        if not failures and not (keys in self.encoders and keys in decoders):
            failures.append(f"{what}: no QuantizeLinear node uses its scale and zero point")
        return failures

    def check_dynamic(self, name: str, prefix: str) -> list[str]:
        """Whether every product with a layer's weight reads the outputs of a DynamicQuantizeLinear node.

        A product with packed weights quantizes its input itself (`check_packed` compares its accuracy level), as does
        a recurrent layer.
        """
        if f"{prefix}weight.codes" in self.packed or f"{prefix}weight.codes" in self.recurrent:
            return []
        dynamic = {tuple(node.output) for node in self.proto.graph.node if node.op_type == "DynamicQuantizeLinear"}
        products = self.products.get(f"{prefix}weight.codes", [])
        if products and all(product.input in dynamic for product in products):
            return []
        return [f"layer '{name}': input: no DynamicQuantizeLinear node quantizes it"]

    def check_biases(self, name: str, layer: QATRecurrent) -> list[str]:
        """Compare the biases of a recurrent layer, which are not quantized and keep their names."""
        return [
            failure
            for key, bias in layer.named_parameters(prefix=name, recurse=False)
            if BIAS.search(key)
            for failure in differences(f"layer '{name}': {key.rpartition('.')[2]}", self.tensors.get(key), bias)
        ]

    def check_parameters(self, model: nn.Module) -> list[str]:
        """Compare the unquantized parameters that the file stores under their own names.

        The exporter's optimizer renames transposed parameters, and folds BatchNorm into the layer before it.
        """
        norms = batch_norms(model)
        quantized = tuple(f"{name}." for name, _ in qat_layers(model) if name)
        return [
            failure
            for key, tensor in model.named_parameters(remove_duplicate=False)
            if key in self.tensors and key not in self.outputs and not key.startswith(quantized)
            if self.tensors[key].shape == tuple(tensor.shape) and tensor.dtype != torch.bfloat16
            for owner, _, part in [key.rpartition(".")]
            if not holds_a_fold(self.tensors[key], model.get_submodule(owner), part, norms)
            for failure in differences(f"parameter '{key}'", self.tensors[key], tensor)
        ]

    def check_bias(self, name: str, prefix: str, layer: QATLayer, grid: str) -> list[str]:
        bias = layer.operands(torch.zeros(layer.matrix.shape[1]))[2]
        codes, scale = (self.tensors.get(f"{prefix}bias.{part}") for part in ("codes", "scale"))
        what = f"layer '{name}': the bias"
        if bias is None:
            return [] if codes is None and f"{prefix}bias" not in self.tensors else [f"{what}: the model has none"]
        if codes is None:
            stored = self.tensors.get(f"{prefix}bias")
            if stored is not None or not self._outputs_of(prefix):
                return differences(what, stored if stored is None else stored.reshape(-1), bias)
            if not bias.any():
                return []  # graph optimizers remove a bias of zeros; the model may add a constant of its own there
            failures = []
            for output in self._outputs_of(prefix):  # one for every call of the layer
                stored = self._added_to(output, bias.numel())
                failures += differences(what, stored if stored is None else stored.reshape(-1), bias)
            return failures
        weight_scale, input_scale = (self.tensors.get(f"{part}.scale") for part in (f"{prefix}weight", grid))
        if scale is None or weight_scale is None or input_scale is None:
            return [f"{what}: its scale, or a factor of its scale (weight scale, input scale), is not in the file"]
        if codes.shape != tuple(bias.shape) or codes.dtype != np.int32:
            return [f"{what}: {codes.dtype} of shape {list(codes.shape)} in the file, not int32 {list(bias.shape)}"]
        product = torch.from_numpy(np.asarray(weight_scale * input_scale)).reshape(scale.shape)
        failures = differences(f"{what}'s scale (weight scale x input scale)", scale, product)
        step = np.broadcast_to(scale.astype(np.float64), codes.shape)
        value = bias.double().numpy()
        wrong = np.abs(codes * step - value) > 2.0**-22 * np.abs(value)  # the error of two float32 roundings
        if wrong.any():
            first = int(wrong.nonzero()[0][0])
            failures.append(
                f"{what}: {int(wrong.sum())} of {wrong.size} codes represent a different value, the first at "
                f"[{first}]: {codes[first]} x {step[first]:.6g} = {codes[first] * step[first]:.6g} in the file, "
                f"{value[first]:.6g} in the model"
            )
        return failures

    def _outputs_of(self, prefix: str) -> list[str]:
        """The outputs of the matrix products and convolutions that use a layer's dequantized weight."""
        codes = f"{prefix}weight.codes"
        weights = {nodes[-1].output[0] for inputs, nodes in self.decoders.items() if inputs[0] == codes}
        outputs = [product.output for product in self.products.get(codes, [])]
        for node in self.proto.graph.node:  # in topological order
            if node.op_type in LAYOUT and weights & set(node.input):
                weights.add(node.output[0])
            elif node.op_type in PRODUCTS and weights & set(node.input):
                outputs.append(node.output[0])
        return outputs

    def _added_to(self, output: str, size: int) -> np.ndarray[Any, Any] | None:
        """The constant of `size` values that is added to a product, inside its node or directly after it."""
        values = {output}
        for node in self.proto.graph.node:
            if output in node.output and len(node.input) > 2 and node.input[2] in self.tensors:
                return self.tensors[node.input[2]]
            if node.op_type in LAYOUT and values & set(node.input):
                values.add(node.output[0])
            elif node.op_type == "Add" and values & set(node.input):
                constants = [self.tensors[name] for name in node.input if name in self.tensors]
                return next((constant for constant in constants if constant.size == size), None)
        return None

    def _compare(self, what: str, key: str, expected: Tensor) -> list[str]:
        stored = self.tensors.get(key)
        if stored is not None and stored.size == expected.numel() and not key.endswith("codes"):
            stored = stored.reshape(expected.shape)  # scales have no trailing dimensions of size 1 in ONNX
        return differences(what, stored, expected)

    def _decode(self, keys: tuple[str, ...]) -> np.ndarray[Any, Any]:
        """Decode one weight with ONNX Runtime: the file's own nodes that decode it, alone in a graph.

        The nodes of an embedding are asked for every row.
        """
        import onnxruntime
        from onnx import TensorProto, helper

        nodes = self.decoders[keys]
        read = {name for node in nodes for name in node.input}
        rows = {node.input[1] for node in nodes if node.op_type == "Gather"}
        graph = helper.make_graph(
            nodes,
            "decode",
            [helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in rows],
            [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
            [tensor for tensor in self.proto.graph.initializer if tensor.name in read],
        )
        single = helper.make_model(graph, opset_imports=self.proto.opset_import, ir_version=self.proto.ir_version)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(single.SerializeToString(), options, providers=["CPUExecutionProvider"])
        every = np.arange(len(self.tensors[keys[0]]))
        decoded: np.ndarray[Any, Any] = session.run(None, dict.fromkeys(rows, every))[0]
        return decoded
