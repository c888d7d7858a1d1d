"""The table of targets: runtimes, with the quantization that allows them to compute with integers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qatkit.common.tables import Table
from qatkit.errors import QatkitError, QatkitWarning
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec

if TYPE_CHECKING:
    from torch import nn

_WEIGHT7, _WEIGHT8 = QuantSpec(num_bits=7), QuantSpec(num_bits=8)
_INPUT = QuantSpec(num_bits=8, symmetric=False, strategy="tensor")
_SIGNED = QuantSpec(num_bits=8, strategy="tensor")
_BATCH = replace(_INPUT, dynamic=True)
_INT4 = QuantSpec(num_bits=4, strategy="group", group_size=32)
_GROUPS = QuantSpec(num_bits=8, strategy="group", group_size=32)
_INT4_BF16 = replace(_INT4, scale_dtype="bfloat16")
_TOKEN = replace(_INPUT, strategy="token")


@dataclass(frozen=True)
class Target:
    """A runtime on a kind of processor."""

    name: str
    """The name in ``quantize: {target: NAME}`` and ``QuantizationAwareTraining(target=NAME)``."""
    description: str
    """One-line description for help texts and docs."""
    formats: tuple[str, ...]
    """The export formats that the runtime loads. Callbacks check the first one before training."""
    weight: QuantSpec
    """Default quantization of weights."""
    activation: QuantSpec | None
    """Default quantization of layer inputs, and of the tensors that the runtime's integer kernels read or write; None
    if only weights are quantized.
    """
    wide_sums: bool = False
    """Whether the processor adds signed 8-bit products in 32 bits, so that they cannot saturate."""
    slow_functions: tuple[str, ...] = ()
    """Classes of activation functions that make an integer convolutional network slower than in float32: they run in
    floating point, between a dequantization and a quantization.
    """
    slow_recurrence: bool = False
    """Whether the steps of recurrent layers with a quantized hidden state run as a loop of single operations."""
    slow_products: bool = False
    """Whether integer matrix products may be slower than in float32; those of convolutions are not."""
    float_bias: bool = False
    """Whether the runtime reads biases in floating point. Their values are those of the int32 codes otherwise."""
    float_outputs: bool = False
    """Whether integer convolutions may return floating-point values. Activation functions and a residual addition are
    then computed on these values, before they are rounded.
    """
    linear_codes: bool = False
    """Whether integer linear layers write codes. Their outputs are then quantized like those of convolutions, including
    the model's own output.
    """


_LINEAR = ("Linear", "MultiheadAttention", "Conv1D")  # Conv1D is the linear layer of transformers' GPT-2
TARGETS = Table(
    "target",
    [
        Target(
            "onnxruntime",
            "ONNX Runtime on any CPU: weights have 7 bits, because sums of 8-bit products overflow without VNNI",
            ("onnx",), _WEIGHT7, _INPUT, slow_functions=("Hardswish",), slow_recurrence=True,
        ),
        Target(
            "onnxruntime-vnni", "ONNX Runtime on x86 with VNNI: weights have 8 bits", ("onnx",), _WEIGHT8, _INPUT,
            wide_sums=True, slow_recurrence=True,
        ),
        Target(
            "onnxruntime-dynamic",
            "ONNX Runtime on any CPU, for transformers and LSTMs: one activation scale per batch and layer, as in "
            "quantize_dynamic",
            ("onnx",), _WEIGHT7, _BATCH,
        ),
        Target(
            "onnxruntime-int4", "ONNX Runtime: linear layers with 4-bit weights in groups", ("onnx", "onnx_genai"),
            _INT4, None,
        ),
        Target(
            "onnxruntime-int4-int8",
            "ONNX Runtime: weights of 4 bits, and inputs of 8 bits whose scales are computed per token and group",
            ("onnx", "onnx_genai"), _INT4, _GROUPS,
        ),
        Target(
            "onnxruntime-arm", "ONNX Runtime on ARM: weights have 8 bits", ("onnx",), _WEIGHT8, _INPUT,
            wide_sums=True, slow_recurrence=True,
        ),
        Target(
            "tensorrt",
            "TensorRT, from an ONNX file with signed 8-bit codes; `verify` runs it in ONNX Runtime, not in TensorRT",
            ("onnx",), _WEIGHT8, _SIGNED, wide_sums=True, float_bias=True, float_outputs=True,
        ),
        Target(
            "openvino",
            "OpenVINO on any x86 CPU: weights have 7 bits, because sums of 8-bit products overflow without VNNI",
            ("openvino",), _WEIGHT7, _INPUT, float_outputs=True, slow_products=True,
        ),
        Target(
            "openvino-vnni", "OpenVINO on x86 with VNNI or AMX: weights have 8 bits", ("openvino",), _WEIGHT8, _INPUT,
            wide_sums=True, float_outputs=True,
        ),
        Target(
            "litert", "LiteRT on any CPU, with its default XNNPACK kernels: weights have 8 bits", ("litert",), _WEIGHT8,
            _INPUT, wide_sums=True, linear_codes=True,
        ),
        Target(
            "executorch", "ExecuTorch on any CPU, with its XNNPACK backend: weights have 8 bits", ("executorch",),
            _WEIGHT8, _INPUT, wide_sums=True, linear_codes=True,
        ),
        Target(
            "executorch-8da4w",
            "ExecuTorch: linear layers with 4-bit weights in groups, and inputs of 8 bits whose scales are computed "
            "per token",
            ("executorch",), _INT4_BF16, _TOKEN,
        ),
    ],
)  # fmt: skip


def warn_of_slow_layers(model: nn.Module, target: str, schemes: Mapping[str, Scheme]) -> None:
    """Warn of activation functions, recurrent and linear layers that make a network slower on a target than in float32.

    Args:
        model: The model; it may be on the meta device.
        target: The target's name.
        schemes: The quantization of each layer, by name.
    """
    recurrent = [
        name
        for name, scheme in schemes.items()
        if scheme.activation is not None and not scheme.activation.scaled_per_batch
        if any(base.__name__ == "RNNBase" for base in type(model.get_submodule(name)).__mro__)
    ]
    if recurrent and TARGETS[target].slow_recurrence:
        others = f" and {len(recurrent) - 1} more" if len(recurrent) > 1 else ""
        warnings.warn(
            f"layer '{recurrent[0]}'{others}: with target '{target}', the steps of a recurrent layer run as a loop of "
            "single operations, which at small batches is slower than in float32; use target: onnxruntime-dynamic for "
            "an LSTM, exclude the layer, or quantize its weights only (layers.NAME: {weight: {num_bits: 8}})",
            QatkitWarning,
            stacklevel=1,
        )
    static = [name for name, scheme in schemes.items() if scheme.activation is not None]
    sizes = {name: sum(p.numel() for p in model.get_submodule(name).parameters(recurse=False)) for name in static}
    kinds = {name: type(model.get_submodule(name)).__name__ for name in static}
    linear = [name for name, kind in kinds.items() if any(word in kind for word in _LINEAR)]
    if TARGETS[target].slow_products and 2 * sum(sizes[name] for name in linear) > sum(sizes.values()):
        others = f" and {len(linear) - 1} more" if len(linear) > 1 else ""
        warnings.warn(
            f"layer '{linear[0]}'{others}: on processors without VNNI, integer matrix products in OpenVINO are slower "
            "than in float32, and most of the quantized weights belong to them; quantize weights only (weight: "
            "{num_bits: 8} without target), or with VNNI use target: openvino-vnni",
            QatkitWarning,
            stacklevel=1,
        )
    slow = TARGETS[target].slow_functions
    found = [name for name, module in model.named_modules() if type(module).__name__ in slow]
    if found:
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        # always the same place in the code, so that Python shows the same warning once
        warnings.warn(
            f"'{found[0]}'{others}: {' and '.join(slow)} runs in floating point between integer layers, so with target "
            f"'{target}' the network may be slower than in float32 on processors without VNNI; use ReLU, or compare "
            "both with `qatkit bench`",
            QatkitWarning,
            stacklevel=1,
        )


def check_placed(activation: QuantSpec | None, target: str) -> None:
    """Raise an error if a target does not support the quantization of activations.

    Raises:
        QatkitError: the target quantizes weights only; the type is not integer; or the scale is not per-tensor, or not
            per-group.
    """
    own = TARGETS[target].activation
    if activation == own:
        return
    if own is None:
        raise QatkitError(
            f"target '{target}' quantizes weights only", key="activation", advice="remove activation or target"
        )
    if activation is not None and activation.is_float:
        raise QatkitError(
            f"'{activation.type}' is not supported with target '{target}': its kernels compute with integers",
            key="activation.type",
            advice="use type: int, or remove target",
        )
    if activation is None or activation.strategy != own.strategy:
        seen = "no quantization" if activation is None else f"'{activation.strategy}'"
        raise QatkitError(
            f"{seen} is not supported with target '{target}': its integer kernels read one scale per {own.strategy}",
            key="activation.strategy",
            advice=f"use strategy: {own.strategy}, or remove target",
        )
