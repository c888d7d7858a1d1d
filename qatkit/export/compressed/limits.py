"""Limitations of the compressed-tensors format and of its readers, plain transformers and vLLM."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.export.transformers_folder import untied_linear_layers
from qatkit.schemes import SCHEMES, Scheme
from qatkit.spec import QuantSpec

INSTEAD = "use export: {format: dense}"
BLOCKS = ("NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16")
"""Schemes of weights in blocks with 8-bit scales."""
INPUT_BLOCKS = ("MXFP4A16", "MXFP8A16")
"""The same for inputs."""
BITS = (2, 4, 8)
"""Supported bit widths of integer weights; versions of compressed-tensors differ in how they pack other widths."""


def check_layers(model: nn.Module, schemes: Mapping[str, Scheme]) -> None:
    """Raise an error for quantization that the format or its readers do not support. Weights are not read.

    Args:
        model: The model, with plain or quantized layers.
        schemes: Quantization by layer name.

    Raises:
        QatkitError: a layer is not supported.
    """
    by_token = {name for name, each in schemes.items() if each.activation and each.activation.strategy == "token"}
    for name in sorted(_without_tokens(model) & by_token) if by_token else ():
        raise QatkitError(
            f"layer '{name}': its input has no token dimension, and there transformers computes one input scale for "
            "the whole batch",
            advice=f"exclude the layer, or {INSTEAD}",
        )
    for name, layer in untied_linear_layers(model, schemes, "compressed_tensors", INSTEAD).items():
        scheme = schemes[name]
        refusal = _weight_problem(scheme, layer.weight.dtype) or _input_problem(scheme, layer.weight.dtype)
        if refusal:
            problem, advice = refusal
            raise QatkitError(f"layer '{name}': {problem}", advice=f"{advice}, or {INSTEAD}")


def _without_tokens(model: nn.Module) -> set[str]:
    """The linear layers that read ``[batch, features]``, such as the pooler of an encoder."""
    if type(model).__name__.endswith("ForCausalLM"):
        return set()
    error: Exception | None = None
    # some models decide by values, so they run only with weights
    has_weights = not any(parameter.is_meta for parameter in model.parameters())
    for device in ("meta", "cpu") if has_weights else ("meta",):
        try:
            return _read_rows(copy.deepcopy(model).to(device))
        except Exception as reason:  # a forward may raise anything
            error = reason
    warnings.warn(
        f"the inputs of {type(model).__name__} cannot be traced before training ({type(error).__name__}). If a layer "
        "with per-token inputs has no token dimension, verification will find that its outputs differ",
        QatkitWarning,
        stacklevel=2,
    )
    return set()


@torch.no_grad()
def _read_rows(model: nn.Module) -> set[str]:
    """The linear layers whose input has two dimensions in a call of the model."""
    found = set[str]()

    def note(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, inputs: found.add(name) if inputs[0].dim() == 2 else None

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(note(name))
    whole: Any = model
    inputs = whole.dummy_inputs
    if whole.main_input_name == "pixel_values":
        size, channels = whole.config.image_size, whole.config.num_channels
        inputs = {"pixel_values": torch.zeros(1, channels, size, size)}
    device = next(model.parameters()).device
    model(**{name: value.to(device) for name, value in inputs.items()})
    return found


Problem = tuple[str, str]
"""An unsupported use of the format, and advice."""


def _weight_problem(scheme: Scheme, dtype: torch.dtype) -> Problem | None:
    spec = scheme.weight
    if spec is None:
        return (
            "compressed_tensors does not support layers with a quantized input and an unquantized weight",
            "quantize the layer's weight too",
        )
    if spec.type == "ternary":
        return "compressed_tensors does not support ternary codes", "set weight: {num_bits: 2}"
    if spec.type == "nonlinear":
        return "compressed_tensors does not store the nonlinear codes of GGUF's IQ4_NL", "set scheme: W4A16"
    if spec.is_float and spec.type != "float":
        return f"compressed_tensors does not store {spec.type} weights", "set scheme: FP8_DYNAMIC"
    if spec.is_float and (spec.num_bits != 8 or spec.float8_scales):
        return _block_problem("weights", spec, BLOCKS, dtype)
    if spec.super_blocks:
        return "compressed_tensors does not store the super-blocks of GGUF's K-quants", "set scheme: W4A16"
    if not spec.symmetric and scheme.activation is None:
        return (
            "transformers cannot load the packed zero points of weight-only quantization",
            "set weight: {symmetric: true}, or scheme: W8A8 with weight: {symmetric: false}",
        )
    if spec.scale_rule == "signed":
        return (
            "scale_rule 'signed' belongs to a GGUF format (Q4_0), which has negative scales",
            "set scheme: W4A16, use export: {format: gguf}",
        )
    if not spec.is_float and spec.num_bits not in BITS:
        return (
            f"different versions of compressed-tensors pack {spec.num_bits}-bit codes differently",
            "set weight: {num_bits: 4} (or 2 or 8)",
        )
    if not spec.is_float and spec.strategy == "block":
        return "compressed_tensors supports block scales only for fp8", "set strategy: group"
    return _scale_problem("weight", spec, dtype)


def _input_problem(scheme: Scheme, dtype: torch.dtype) -> Problem | None:
    spec = scheme.activation
    if spec is None:
        return None
    if spec.is_float and (spec.type != "float" or spec.num_bits == 6):
        return (
            f"transformers does not quantize inputs to {spec.num_bits}-bit {spec.type}",
            "set scheme: FP8_DYNAMIC",
        )
    if spec.two_level:
        return (
            "transformers computes the input scales of NVFP4 in bfloat16, but training computes them in float32",
            "set scheme: NVFP4A16 or MXFP4",
        )
    if spec.is_float and (spec.num_bits != 8 or spec.float8_scales):
        return _block_problem("inputs", spec, INPUT_BLOCKS, dtype)
    if spec.is_float and scheme.weight is not None and scheme.weight.float8_scales:
        return (
            "transformers divides fp8 inputs by their scales in bfloat16, but training does so in float32",
            "set scheme: MXFP4A16 or MXFP8",
        )
    if not spec.symmetric:
        return "vLLM and transformers agree only on symmetric input quantization", "set activation: {symmetric: true}"
    if not spec.is_float and spec.num_bits not in (4, 8):
        return f"no kernel supports {spec.num_bits}-bit inputs", "set activation: {num_bits: 8}"
    if spec.dynamic:
        return "per-tensor inputs need a calibrated scale", "remove dynamic, or set activation: {strategy: token}"
    if not spec.is_float and spec.strategy == "group":
        return "per-group input quantization is supported only with fp8", "set activation: {strategy: token}"
    if spec.strategy == "token" and not spec.is_float and spec.scale_rule != "range":
        return (
            "transformers divides a token's largest magnitude by half the range of codes (127.5), but training divides "
            "by the largest code",
            "set scheme: W8A8 or activation: {scale_rule: range}",
        )
    if spec.strategy in ("token", "group") and spec.scale_dtype != dtype_name(dtype):
        name = dtype_name(dtype)
        return f"transformers computes input scales in {name}", f"set activation: {{scale_dtype: {name}}}"
    return _scale_problem("activation", spec, dtype)


def _block_problem(what: str, spec: QuantSpec, schemes: tuple[str, ...], dtype: torch.dtype) -> Problem | None:
    """Whether a spec with 8-bit scales is not that of one of these schemes in bfloat16."""
    fields = ("num_bits", "strategy", "group_size", "scale_dtype")
    known = [SCHEMES[name].weight for name in schemes]
    if not any(row is not None and all(getattr(row, each) == getattr(spec, each) for each in fields) for row in known):
        names = [name.removesuffix("A16") for name in schemes]
        return (
            f"compressed_tensors stores {spec.num_bits}-bit float {what} only as {', '.join(names)}",
            f"set scheme: {schemes[0]}",
        )
    if dtype != torch.bfloat16:
        return (
            f"transformers decodes {spec.num_bits}-bit floats with 8-bit scales to bfloat16, but the model is in "
            f"{dtype_name(dtype)}",
            "use a bfloat16 model",
        )
    return None


def _scale_problem(side: str, spec: QuantSpec, dtype: torch.dtype) -> Problem | None:
    # a float32 file holds any scale; a half-precision one is loaded entirely in its dtype, scales included
    name = dtype_name(dtype)
    if dtype == torch.float32 or spec.scale_dtype == name:
        return None
    return (
        f"the file, including its scales, is loaded in {name}, but training keeps scales in {spec.scale_dtype}",
        f"set {side}: {{scale_dtype: {name}}}",
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in a spec, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
