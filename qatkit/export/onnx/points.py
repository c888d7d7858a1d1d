"""Outputs that integer kernels write in an ONNX graph: their QDQ nodes, names and pooling."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from qatkit.export.onnx.qdq_nodes import InputQuantizer
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.placement.points import SUFFIX, point_parts


@torch.no_grad()
def to_qdq_points(model: nn.Module) -> None:
    """Replace the output quantizers with QDQ nodes, in place."""
    made: dict[int, nn.Module] = {}
    for module in list(model.modules()):
        for part in point_parts(module):
            fake_quant = cast(FakeQuantize, module._modules[part + SUFFIX])
            if id(fake_quant) not in made:
                made[id(fake_quant)] = InputQuantizer.of(fake_quant)
            module._modules[part + SUFFIX] = made[id(fake_quant)]


def points_of(model: nn.Module) -> dict[str, FakeQuantize]:
    """Return the output quantizers by their names in the file, ``{module}.{part}``; a shared quantizer occurs once."""
    found: dict[int, tuple[str, FakeQuantize]] = {}
    for name, module in model.named_modules():
        for part in point_parts(module):
            fake_quant = cast(FakeQuantize, module._modules[part + SUFFIX])
            found.setdefault(id(fake_quant), (f"{name}.{part}".removeprefix("."), fake_quant))
    return dict(found.values())


def name_points(graph_model: Any, model: nn.Module) -> None:
    """Name the constants of output quantizers ``{module}.{part}.scale`` and ``.zero_point``.

    A shared quantizer has its first name, as in `points_of`, because tracing uses a different one.
    """
    initializers = graph_model.graph.initializers
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for part in point_parts(module):
            prefix = f"{name}.{part}".removeprefix(".")
            named = first.setdefault(id(module._modules[part + SUFFIX]), prefix)
            for key in ("scale", "zero_point"):
                if (value := initializers.pop(f"{prefix}{SUFFIX}.{key}", None)) is not None:
                    value.name = f"{named}.{key}"
                    initializers[value.name] = value


def pool_globally(graph_model: Any) -> None:
    """Replace means over image positions with GlobalAveragePool, which has an integer kernel."""
    from onnxscript import ir

    graph = graph_model.graph
    for node in list(graph):
        if node.op_type != "ReduceMean" or len(node.inputs) != 2 or node.inputs[0].shape is None:
            continue
        axes = ir.convenience.get_const_tensor(node.inputs[1])
        rank = len(node.inputs[0].shape)
        if axes is None or rank != 4 or {int(axis) % rank for axis in axes.numpy().reshape(-1)} != {2, 3}:
            continue
        pooled = ir.node("GlobalAveragePool", [node.inputs[0]])
        added = [pooled]
        keeps = node.attributes.get("keepdims")
        if keeps is not None and not keeps.as_int():
            added.append(ir.node("Squeeze", [*pooled.outputs, node.inputs[1]]))
        last = added[-1].outputs[0]
        last.name, last.shape, last.dtype = node.outputs[0].name, node.outputs[0].shape, node.outputs[0].dtype
        ir.convenience.replace_nodes_and_values(graph, node, [node], added, node.outputs, [last])
        if len(added) == 2:
            _squeeze_behind_quantizer(graph, pooled, added[1])


def _squeeze_behind_quantizer(graph: Any, pooled: Any, squeeze: Any) -> None:
    """Move a Squeeze node behind the quantizer that reads it: between them, the pooling would not be fused."""
    from onnxscript import ir

    encoder = _only_reader(squeeze.outputs[0], "QuantizeLinear")
    decoder = encoder and _only_reader(encoder.outputs[0], "DequantizeLinear")
    if not decoder:
        return
    encoder.replace_input_with(0, pooled.outputs[0])
    encoder.outputs[0].shape = decoder.outputs[0].shape = None
    graph.remove(squeeze)
    ir.convenience.replace_all_uses_with(decoder.outputs[0], squeeze.outputs[0])
    squeeze.replace_input_with(0, decoder.outputs[0])
    graph.insert_after(decoder, squeeze)


def _only_reader(value: Any, kind: str) -> Any:
    readers = {id(use.node): use.node for use in value.uses()}
    reader = next(iter(readers.values()), None)
    return reader if len(readers) == 1 and reader is not None and reader.op_type == kind else None
