"""Replace the floating-point weights in a decoder's graph with packed codes and scales.

The model builder of onnxruntime-genai renames tensors, so a layer's weight is identified by its values.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.export.onnx.packed import Packed, PackedEmbedding, packed_class, packing_of, scheme_of
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.prepare import qat_layers

CONFIG = "genai_config.json"
"""The file that onnxruntime-genai opens."""
GRAPH = "model.onnx"
DATA = f"{GRAPH}.data"
_DOMAIN = "com.microsoft"


def digest(values: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    """Return a key that equal arrays share."""
    return (*values.shape, hashlib.sha256(np.ascontiguousarray(values, np.float32).tobytes()).hexdigest())


@torch.no_grad()
def pack_graph(model: nn.Module, source: Path, target: Path) -> None:
    """Write a graph whose quantized layers read packed weights.

    Args:
        model: The model, prepared by `prepare_qat`.
        source: The floating-point graph that contains the model's dense weights.
        target: The output file. The tensors are stored in a file beside it.

    Raises:
        QatkitError: the graph does not contain a layer's weight, or uses it in a node other than a product or a gather.
    """
    import onnx_ir as ir

    made = ir.load(source)
    found: defaultdict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for value in made.graph.initializers.values():
        tensor: Any = value.const_value
        if tensor.numpy().ndim == 2:
            found[digest(tensor.numpy())].append(value)
    for name, layer in qat_layers(model):
        gathered = packed_class(type(layer)) is PackedEmbedding
        assert layer.weight_fake_quant is not None
        weight = layer.weight_fake_quant(layer.matrix).numpy()
        values = found[digest(weight if gathered else weight.T)]
        if not values:
            raise QatkitError(
                f"layer '{name}': the onnxruntime-genai graph does not contain its weight",
                advice="exclude the layer, or use export: {format: gguf}",
            )
        _replace(made.graph, values.pop(0), name, layer, gathered)
    for key in [key for key, value in made.graph.initializers.items() if not value.uses()]:
        del made.graph.initializers[key]  # biases that the products add now
    made.producer_version = ""  # the builder writes the revision of any repository around the environment
    ir.save(made, target, external_data=DATA)


def _replace(graph: Any, weight: Any, name: str, layer: QATLayer, gathered: bool) -> None:
    for node, index in weight.uses():
        if (node.op_type, index) != (("Gather", 0) if gathered else ("MatMul", 1)):
            raise QatkitError(
                f"layer '{name}': onnxruntime-genai reads its weight in a {node.op_type} node",
                advice="exclude the layer, or use export: {format: gguf}",
            )
    constants = _constants(graph, name, layer)
    for node, _ in list(weight.uses()):
        (_gather if gathered else _multiply)(graph, node, name, layer, constants)
    del graph.initializers[weight.name]


def _constants(graph: Any, name: str, layer: QATLayer) -> dict[str, Any]:
    """The initializers of the packed weight, by part; None for zero points of symmetric codes."""
    fake_quant = layer.weight_fake_quant
    assert fake_quant is not None
    scale, zero_point = fake_quant.qparams(layer.matrix)
    codes = quantize(layer.matrix, scale, zero_point, fake_quant.spec)
    packing = packing_of(type(layer), layer.matrix.shape[1], scheme_of(layer))
    assert packing is not None
    rows = packed_class(type(layer)) is PackedEmbedding
    packed = Packed(codes, scale, zero_point, fake_quant.spec, packing, rows)
    parts = {"codes": packed.codes, "scale": packed.scale, "zero_point": packed.zero_point, "bias": layer.bias}
    keys = {part: f"{name}.bias" if part == "bias" else f"{name}.weight.{part}" for part in parts}
    made = {part: _initializer(graph, keys[part], tensor) for part, tensor in parts.items() if tensor is not None}
    return {"packing": packing, "inputs": packed.shape[1], "outputs": packed.shape[0], **made}


def _initializer(graph: Any, name: str, tensor: Tensor) -> Any:
    import onnx_ir as ir

    value = ir.Value(name=name, const_value=ir.tensor(tensor.detach().contiguous().numpy(), name=name))
    graph.initializers[name] = value
    return value


def _multiply(graph: Any, node: Any, name: str, layer: QATLayer, constants: dict[str, Any]) -> None:
    packing, bias = constants["packing"], constants.get("bias")
    sizes = {"K": constants["inputs"], "N": constants["outputs"], "bits": packing.bits, "block_size": packing.block}
    read = [node.inputs[0], constants["codes"], constants["scale"], constants.get("zero_point"), None, bias]
    output = node.outputs[0]
    if bias is not None:  # the product adds it, instead of the node that follows
        added = [use for use, _ in output.uses()]
        if [use.op_type for use in added] != ["Add"]:
            raise QatkitError(
                f"layer '{name}': no node of onnxruntime-genai's graph adds its bias",
                advice="exclude the layer, or use export: {format: gguf}",
            )
        output = added[0].outputs[0]
    _insert(graph, node, "MatMulNBits", read, sizes | {"accuracy_level": packing.level}, output)


def _gather(graph: Any, node: Any, name: str, layer: QATLayer, constants: dict[str, Any]) -> None:
    packing = constants["packing"]
    sizes = {"gather_axis": 0, "quantize_axis": 1, "bits": packing.bits, "block_size": packing.block}
    read = [constants["codes"], node.inputs[1], constants["scale"], constants.get("zero_point")]
    _insert(graph, node, "GatherBlockQuantized", read, sizes, node.outputs[0])


def _insert(graph: Any, node: Any, kind: str, inputs: list[Any], sizes: dict[str, int], output: Any) -> None:
    """Put a node of ONNX Runtime's domain in the place of a node and of those up to `output`."""
    import onnx_ir as ir

    while inputs[-1] is None:
        inputs = inputs[:-1]
    attributes = [ir.AttrInt64(key, value) for key, value in sizes.items()]
    made = ir.Node(_DOMAIN, kind, inputs, attributes, num_outputs=1, name=f"{node.name}Packed")
    graph.insert_before(node, made)
    last, name = output.producer(), output.name
    new = made.outputs[0]
    new.name, new.type, new.shape = name, output.type, output.shape
    output.name = f"{name}.replaced"
    ir.convenience.replace_all_uses_with(output, new, replace_graph_outputs=True)
    graph.remove([node] if last is node else [last, node], safe=True)
