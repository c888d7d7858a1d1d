"""What ONNX Runtime cannot compute as training does, refused before training."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.export.interface import PlannedExport
from qatkit.export.onnx.packed import packing_of
from qatkit.export.onnx.qdq_layers import QDQLinear, QDQTransposedLinear, qdq_class
from qatkit.export.onnx.qdq_nodes import DYNAMIC
from qatkit.export.onnx.qdq_parts import EXPLICIT, QDQMultiheadAttention
from qatkit.quantization.layers import QATLayer, swap_of
from qatkit.quantization.parts import QATParts
from qatkit.quantization.swaps import parts_class
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec

_INSTEAD = "use export: {format: dense}"


def check(model: nn.Module, planned: PlannedExport, packs: bool = True) -> None:
    """Raise an error if a model cannot be exported to ONNX for ONNX Runtime. Weights are not read.

    Args:
        model: The model.
        planned: Its quantization.
        packs: Whether weights may be packed (`qatkit.export.onnx.packed`).

    Raises:
        QatkitError: QDQ does not support a quantized layer, or the KV cache is quantized.
    """
    if planned.kv_cache:
        raise QatkitError(
            "ONNX export does not support KV cache quantization", advice=f"remove kv_cache, or {_INSTEAD}"
        )
    for name, scheme in planned.schemes.items():
        _check_layer(name, model.get_submodule(name), scheme, packs)


def _check_layer(name: str, layer: nn.Module, scheme: Scheme, packs: bool) -> None:
    parts = type(layer) if isinstance(layer, QATParts) else parts_class(layer)
    kind = type(layer) if isinstance(layer, QATLayer) else swap_of(type(layer))
    if (qdq_class(kind) if parts is None else EXPLICIT.get(parts)) is None:
        what = f"a quantized {_plain_name(layer)}" if parts is None else f"quantized {parts.kind}"
        raise QatkitError(
            f"layer '{name}': ONNX export does not support {what}",
            advice=f"exclude the layer, or {_INSTEAD}",
        )
    dtype = str(next(layer.parameters(recurse=False)).dtype).removeprefix("torch.")
    if dtype != "float32":
        raise QatkitError(
            f"layer '{name}': the weight is {dtype}, but the ONNX graph dequantizes to float32",
            advice="train in float32 (trainer.precision: 32-true or bf16-mixed)",
        )
    inputs = scheme.activation
    packed = packs and kind is not None and packing_of(kind, _row_size(layer, kind), scheme) is not None
    if inputs is not None and inputs.scaled_per_batch and not packed:
        _check_dynamic(name, layer, qdq_class(kind) if parts is None else EXPLICIT[parts], inputs, scheme.weight)
        if scheme.weight is not None and scheme.weight.group_size is not None:
            raise QatkitError(
                f"layer '{name}': ONNX Runtime runs weights in groups of {scheme.weight.group_size} with dynamic "
                "activations in floating point",
                advice="set weight.strategy: channel, or for 4-bit weights target: onnxruntime-int4-int8",
            )
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        _check_embedding(name, layer, scheme, packed)
    if inputs is not None and scheme.weight is None:
        raise QatkitError(
            f"layer '{name}': the input is quantized but the weight is not, and ONNX Runtime would quantize the "
            "weight to 8 bits with its own rule",
            advice="set weight: {num_bits: 8}, or remove activation",
        )
    for role, spec in (("weight", scheme.weight), ("activation", inputs)):
        if spec is not None and spec.has_minimum:
            raise QatkitError(
                f"layer '{name}': ONNX has zero points, but no minima as in K-quants ({_words(spec)})",
                advice="set scheme: Q6_K or Q3_K, or use export: {format: gguf}",
            )
        if spec is not None and (spec.type != "int" or spec.strategy == "block"):
            raise QatkitError(
                f"layer '{name}': ONNX integer QDQ does not support {role} quantization with {_words(spec)}",
                advice="set type: int with strategy tensor, channel or group, or choose another format",
            )


def _row_size(layer: nn.Module, kind: type[QATLayer]) -> int:
    """The number of inputs per output, or the size of an embedding's rows."""
    return cast(Tensor, layer.weight).shape[0 if kind.transposed else 1]


def _check_dynamic(
    name: str, layer: nn.Module, kind: type[nn.Module] | None, spec: QuantSpec, weight: QuantSpec | None
) -> None:
    if replace(spec, observer="minmax") != DYNAMIC:
        raise QatkitError(
            f"layer '{name}': ONNX Runtime does not support dynamic activation quantization with {_words(spec)}",
            advice="set activation: {num_bits: 8, symmetric: false, strategy: tensor, dynamic: true}, or remove "
            "dynamic and calibrate the scale, or for ONNX Runtime set activation: {num_bits: 8, strategy: "
            "group, group_size: G}, where G is 16, 32, 64, 128 or 256 and divides the weight's group size, or "
            "choose another format",
        )
    lstm = isinstance(layer, nn.LSTM) and not layer.proj_size
    if kind not in (QDQLinear, QDQTransposedLinear, QDQMultiheadAttention) and not lstm:
        what = "an LSTM with projections and with" if isinstance(layer, nn.LSTM) else f"a {_plain_name(layer)} with"
        raise QatkitError(
            f"layer '{name}': ONNX Runtime runs {what} dynamic activations in floating point",
            advice="set target: onnxruntime, whose activations are static, or exclude the layer",
        )
    if lstm and weight is not None and not (weight.symmetric or weight.strategy == "tensor"):
        raise QatkitError(
            f"layer '{name}': ONNX Runtime does not support an LSTM with dynamic activations and one zero point per "
            "channel of the weight",
            advice="set weight: {symmetric: true} or {strategy: tensor}",
        )


def _check_embedding(name: str, layer: nn.Embedding | nn.EmbeddingBag, scheme: Scheme, packed: bool) -> None:
    weight = scheme.weight
    if weight is not None and weight.strategy == "group" and not packed:
        raise QatkitError(
            f"layer '{name}': ONNX export does not support {_plain_name(layer)} with groups of {weight.group_size}",
            advice="set strategy: channel (one scale per row), or, for nn.Embedding with format: onnx, a group_size "
            "that is a multiple of 16, or exclude the layer",
        )
    if layer.max_norm is not None:
        raise QatkitError(
            f"layer '{name}': ONNX export does not support max_norm={layer.max_norm} of embeddings, which changes "
            "the weight during inference",
            advice="set max_norm=None, or exclude the layer",
        )


def _plain_name(layer: nn.Module) -> str:
    return type(layer).__name__.removeprefix("QAT")


def _words(spec: QuantSpec) -> str:
    kind = "" if spec.type == "int" else f"type: {spec.type}, "
    return f"{kind}num_bits: {spec.num_bits}, symmetric: {str(spec.symmetric).lower()}, strategy: {spec.strategy}"
