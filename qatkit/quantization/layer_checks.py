"""Check the weight, type and sizes of a selected layer against its quantization."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.quantization.experts import is_experts
from qatkit.quantization.layers import swap_of
from qatkit.quantization.scale_dtypes import SUPER_BLOCK
from qatkit.quantization.swaps import parts_class, plain_parts
from qatkit.schemes import Scheme


def check_layer(name: str, layer: nn.Module, scheme: Scheme) -> None:
    """Raise an error if a layer cannot be quantized with its scheme.

    Args:
        name: The layer's name, for errors.
        layer: A plain layer that has a quantized class.
        scheme: Its quantization.
    """
    kind = parts_class(layer)
    weights: list[tuple[str, Tensor | None, int]]
    dims = 2
    if kind is None:
        assert isinstance(layer.weight, Tensor)
        weights = [(name, layer.weight, layer.weight.shape[0] if _is_transposed(layer) else layer.weight.shape[1])]
        dims = layer.weight.dim()
    else:
        weights = [(f"{name}.{part}", w, matrix.shape[1]) for part, w, matrix in plain_parts(layer, kind)]
    for own, weight, inputs in weights:
        _check_weight(own, layer, weight, inputs, scheme)
    if scheme.activation is None:
        return
    if is_experts(layer) or isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        reason = "fused experts route their inputs internally" if is_experts(layer) else "the inputs are integers"
        raise QatkitError(
            f"only the weight of layer '{name}' can be quantized, because {reason}", key="activation",
            advice="add a weight-only entry for the layer to layers, or exclude the layer",
        )  # fmt: skip
    if scheme.activation.strategy == "token" and dims != 2:
        raise QatkitError(
            f"'token' is supported only for linear layers, but layer '{name}' is a "
            f"{type(layer).__name__}", key="activation.strategy", advice="use tensor, or exclude the layer",
        )  # fmt: skip
    size = scheme.activation.group_size
    if size is not None and dims != 2:
        raise QatkitError(
            f"'group' is supported only for linear layers, but layer '{name}' is a {type(layer).__name__}",
            key="activation.strategy", advice="use tensor, or exclude the layer",
        )  # fmt: skip
    for own, _, inputs in weights:
        if size is not None and inputs % size:
            raise QatkitError(
                f"{size} does not divide in_features={inputs} of layer '{own}'", key="activation.group_size",
                advice=f"use one of {_divisors(inputs)}, or exclude the layer",
            )  # fmt: skip


def check_ties(model: nn.Module, schemes: Mapping[str, Scheme]) -> None:
    """Raise an error if layers that share one weight are quantized differently.

    Quantizing only one of the layers is allowed.
    """
    _check_ties_of_parts(model, schemes)
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or name not in schemes:
            continue
        first = owners.setdefault(id(weight), name)
        if _is_transposed(model.get_submodule(first)) != _is_transposed(module):
            raise QatkitError(
                f"layers '{first}' and '{name}' share one weight, but the outputs of one are the inputs of the other, "
                "so their scales differ",
                advice="exclude both layers, or untie the weight",
            )
        if schemes[first].weight != schemes[name].weight:
            raise QatkitError(
                f"layers '{first}' and '{name}' share one weight but have different weight specs",
                advice="use the same weight spec for both layers, or exclude one of them",
            )


def _check_ties_of_parts(model: nn.Module, schemes: Mapping[str, Scheme]) -> None:
    """Raise an error if a layer with several weights shares one: its scales are its own."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name in schemes:
        layer = model.get_submodule(name)
        if (kind := parts_class(layer)) is None:
            continue
        for part, weight, _ in plain_parts(layer, kind):
            others = [other for other in owners.get(id(weight), []) if other != name]
            if others:
                raise QatkitError(
                    f"'{part}' of layer '{name}' is tied to '{others[0]}', but tied weights of {kind.kind} cannot be "
                    "quantized",
                    advice="exclude both layers, or untie the weight",
                )


def _check_weight(name: str, layer: nn.Module, weight: Tensor | None, inputs: int, scheme: Scheme) -> None:
    if not isinstance(weight, nn.Parameter):
        raise QatkitError(
            f"the weight of layer '{name}' is computed by a hook (torch's prune, weight_norm or spectral_norm)",
            advice="make the weight permanent (prune.remove, remove_weight_norm), or exclude the layer",
        )
    if weight.numel() == 0:
        raise QatkitError(
            f"the weight of layer '{name}' with shape {list(weight.shape)} is empty", advice="exclude the layer"
        )
    if not weight.is_meta and not weight.isfinite().all():
        raise QatkitError(
            f"the weight of layer '{name}' has non-finite values", advice="use a checkpoint with finite weights"
        )
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
        raise QatkitError(f"embedding '{name}' has sparse gradients and cannot be quantized", advice="set sparse=False")
    spec = scheme.weight
    if spec is not None and is_experts(layer) and spec.strategy in ("tensor", "block"):
        raise QatkitError(
            f"'{spec.strategy}' is not supported for the fused experts '{name}', whose experts have separate scales",
            key="weight.strategy", advice="use channel or group, in a separate entry in layers",
        )  # fmt: skip
    if spec is None or spec.strategy not in ("group", "block"):
        return
    if weight.dim() > 2 and parts_class(layer) is None:
        raise QatkitError(
            f"'{spec.strategy}' is supported only for linear layers, but the weight of layer '{name}' has shape "
            f"{list(weight.shape)}",
            key="weight.strategy", advice="use channel, or exclude the layer",
        )  # fmt: skip
    if spec.group_size is None:
        return
    if spec.super_blocks and inputs % SUPER_BLOCK:
        smaller = f"set layers: {{{name}: {{scheme: Q4_0}}}} (blocks of 32), or " if inputs % 32 == 0 else ""
        raise QatkitError(
            f"super-blocks of {SUPER_BLOCK} do not divide in_features={inputs} of layer '{name}'",
            key="weight.scale_dtype", advice=f"{smaller}exclude the layer",
        )  # fmt: skip
    if inputs % spec.group_size:
        raise QatkitError(
            f"{spec.group_size} does not divide in_features={inputs} of layer '{name}'", key="weight.group_size",
            advice=f"use one of {_divisors(inputs)}, or exclude the layer",
        )  # fmt: skip


def _is_transposed(layer: nn.Module) -> bool:
    kind = swap_of(type(layer))
    return kind is not None and kind.transposed


def _divisors(size: int) -> str:
    return ", ".join([str(n) for n in range(4, size + 1) if size % n == 0][:8]) or str(size)
