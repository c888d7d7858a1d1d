"""Convert a decoder to OpenVINO: a stateful graph with a cache of keys and values, and packed integer weights.

OpenVINO renames parameters, so a layer's weight is identified by its values.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.export.genai.graph import digest
from qatkit.export.transformers_folder import quietly
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.prepare import qat_layers

TYPES = {(4, True): "i4", (4, False): "u4", (8, True): "i8", (8, False): "u8"}
"""OpenVINO's types of codes, by number of bits and symmetry."""
_INPUTS = ("input_ids", "attention_mask", "position_ids")


def is_float_constant(node: Any) -> bool:
    """Whether a node of an OpenVINO graph is a float32 constant."""
    return bool(node.get_type_name() == "Constant" and node.get_element_type().get_type_name() == "f32")


class _WithCache(nn.Module):
    """A causal language model whose cache of keys and values is an argument and a result."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = cast(Any, DynamicLayer)()
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.dtype, layer.device = keys.dtype, keys.device
            cache.layers.append(layer)
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        present = [part for layer in outputs.past_key_values.layers for part in (layer.keys, layer.values)]
        return (outputs.logits, *present)


@torch.no_grad()
def converted(plain: Any, model: nn.Module) -> Any:
    """Return the OpenVINO graph of a decoder, in the form that openvino-genai expects.

    Args:
        plain: The decoder with the dense weights of `model`, in eval mode on the CPU. Its attention becomes eager.
        model: The same model, prepared by `prepare_qat`.

    Raises:
        QatkitError: the graph does not contain a layer's weight.
    """
    import openvino

    config = plain.config
    plain.set_attn_implementation("eager")
    heads, size = config.num_key_value_heads, plain.model.layers[0].self_attn.head_dim
    past = [torch.zeros(1, heads, 4, size) for _ in range(2 * config.num_hidden_layers)]
    example = (
        torch.arange(8)[None] % config.vocab_size,
        torch.ones(1, 12, dtype=torch.long),
        torch.arange(4, 12)[None],
    )
    with quietly():  # torch's tracing, which OpenVINO calls, warns
        made = openvino.convert_model(_WithCache(plain), example_input=(*example, *past))
    _make_stateful(made, config.num_hidden_layers, heads, size)
    _pack(made, model)  # last: other passes would compute the shape of a weight from the sizes of activations
    return made


def _pack(made: Any, model: nn.Module) -> None:
    """Replace the floating-point weights of quantized layers by their codes, scales and zero points."""
    found: defaultdict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for node in made.get_ordered_ops():
        if is_float_constant(node) and len(node.shape) == 2:
            found[digest(node.data)].append(node)
    for name, layer in qat_layers(model):
        constants = found[digest(layer.fake_quantized_weight().numpy())]
        if not constants:
            raise QatkitError(
                f"layer '{name}': OpenVINO's graph does not contain its weight",
                advice="exclude the layer, or use export: {format: onnx_genai}",
            )
        decoded = _decoder(name, layer)
        for target in constants.pop(0).output(0).get_target_inputs():
            target.replace_source_output(decoded.output(0))


def _decoder(name: str, layer: QATLayer) -> Any:
    """The nodes that decode a weight: ``(codes - zero point) * scale``."""
    from openvino import opset13 as ops

    fake_quant = layer.weight_fake_quant
    assert fake_quant is not None
    spec = fake_quant.spec
    scale, zero_point = fake_quant.qparams(layer.matrix)
    codes = quantize(layer.matrix, scale, zero_point, spec).numpy()
    shape, (rows, groups) = codes.shape, scale.shape
    kind = TYPES[spec.num_bits, spec.symmetric]
    node = ops.convert(_constant(codes.reshape(rows, groups, -1), kind, f"{name}.weight.codes"), "f32")
    if not spec.symmetric:
        points = zero_point.to(torch.uint8).expand(scale.shape).numpy().reshape(rows, groups, 1)
        node = ops.subtract(node, ops.convert(_constant(points, kind, f"{name}.weight.zero_point"), "f32"))
    scales = ops.constant(scale.numpy().reshape(rows, groups, 1), name=f"{name}.weight.scale")
    node = ops.multiply(node, scales)
    decoded = ops.reshape(node, ops.constant(np.array(shape, np.int64)), False)
    decoded.set_friendly_name(f"{name}.weight")
    return decoded


def _constant(values: np.ndarray[Any, Any], kind: str, name: str) -> Any:
    """A constant of 4 or 8 bits per value; of two values of 4 bits in a byte, the first has the lower bits."""
    import openvino
    from openvino import opset13 as ops

    flat = values.reshape(-1).view(np.uint8)
    packed = (flat[0::2] & 15) | ((flat[1::2] & 15) << 4) if kind.endswith("4") else flat
    tensor = openvino.Tensor(getattr(openvino.Type, kind), openvino.Shape(list(values.shape)))
    tensor.data.view(np.uint8).reshape(-1)[:] = packed
    node = ops.constant(tensor)
    node.set_friendly_name(name)
    return node


def _make_stateful(made: Any, layers: int, heads: int, size: int) -> None:
    """Name the inputs, and keep the cache in the state of the graph, as openvino-genai expects it."""
    import openvino
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    pairs = [f"{index}.{part}" for index in range(layers) for part in ("key", "value")]
    past, present = ([f"{when}.{pair}" for pair in pairs] for when in ("past_key_values", "present"))
    shapes = {}
    for node, name in zip(made.inputs, (*_INPUTS, *past), strict=True):
        node.get_tensor().set_names({name})
        shapes[node] = openvino.PartialShape([-1, -1] if name in _INPUTS else [-1, heads, -1, size])
    for node, name in zip(made.outputs, ("logits", *present), strict=True):
        node.get_tensor().set_names({name})
    made.reshape(shapes)
    beams = ops.parameter([-1], np.int32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    made.add_parameters([beams])
    for name in past:
        cached = made.input(name).get_node()
        chosen = ops.gather(cached, beams, ops.constant(np.int64(0)))
        for target in cached.output(0).get_target_inputs():
            if target.get_node() != chosen:
                target.replace_source_output(chosen.output(0))
    apply_make_stateful_transformation(made, dict(zip(past, present, strict=True)))
    batch = ops.gather(
        ops.shape_of(made.input("input_ids"), "i64"), ops.constant(np.array([0], np.int64)), ops.constant(np.int64(0))
    )
    empty = ops.concat([batch, ops.constant(np.array([heads, 0, size], np.int64))], 0)
    for node in made.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([ops.broadcast(ops.constant(np.float32(0)), empty)])
    made.validate_nodes_and_infer_types()
