"""Limitations of the layouts of GPTQ and AWQ, and of the programs that read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from qatkit.errors import QatkitError
from qatkit.export.gptq.layouts import WORD, Layout
from qatkit.export.transformers_folder import untied_linear_layers
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec

INSTEAD = "use export: {format: compressed_tensors} or {format: dense}"

_BLOCK = re.compile(r"(?P<blocks>.+?)\.(?P<index>\d+)\.(?P<name>.+)")
"""The name of a layer in one of a model's blocks: "model.layers.0.mlp.up_proj"."""


def check_layers(model: nn.Module, schemes: Mapping[str, Scheme], layout: Layout) -> None:
    """Raise an error for quantization that a layout or its readers do not support. Weights are not read.

    Args:
        model: The model, with plain or quantized layers.
        schemes: Quantization by layer name.
        layout: The layout.

    Raises:
        QatkitError: a layer is not supported, or two layers are quantized differently.
    """
    head = cast(Any, model).get_output_embeddings()
    first: tuple[str, tuple[object, ...]] | None = None
    for name, layer in untied_linear_layers(model, schemes, layout.name, INSTEAD).items():
        if layer is head:
            raise QatkitError(
                f"layer '{name}': readers of '{layout.name}' expect an output layer that is not quantized",
                advice=f"exclude the layer, or {INSTEAD}",
            )
        if layer.weight.dtype != torch.float32:
            raise QatkitError(
                f"layer '{name}': the weight is {str(layer.weight.dtype).removeprefix('torch.')}, to which training "
                f"rounds the dequantized weights, but '{layout.name}' stores codes and scales only",
                advice=f"train float32 weights (trainer.precision: 32-true or bf16-mixed), or {INSTEAD}",
            )
        if (refusal := _scheme_problem(schemes[name], layout) or _shape_problem(schemes[name], layer)) is not None:
            raise QatkitError(f"layer '{name}': {refusal[0]}", advice=f"{refusal[1]}, or {INSTEAD}")
        spec = cast(QuantSpec, schemes[name].weight)
        key = spec.num_bits, spec.symmetric, spec.group_size
        first = first or (name, key)
        if key != first[1]:
            raise QatkitError(
                f"layers '{first[0]}' and '{name}': '{layout.name}' has one num_bits, symmetric and group_size for all "
                f"layers, but they have {first[1]} and {key}",
                advice=f"quantize both layers alike, or {INSTEAD}",
            )


def _scheme_problem(scheme: Scheme, layout: Layout) -> tuple[str, str] | None:
    spec = scheme.weight
    if spec is None or scheme.activation is not None:
        return f"'{layout.name}' stores quantized weights, and inputs that are not quantized", "remove activation"
    keys: tuple[tuple[str, object, tuple[object, ...]], ...] = (
        ("type", spec.type, ("int",)),
        ("strategy", spec.strategy, ("group", "channel")),
        ("num_bits", spec.num_bits, layout.bits),
        ("group_size", spec.group_size, (None, *layout.group_sizes)),
        ("scale_dtype", spec.scale_dtype, ("float16",)),
    )
    for key, value, fitting in keys:
        if value not in fitting:
            choice = " or ".join(str(option) for option in fitting if option is not None)
            return f"'{layout.name}' does not support {key}: {value}", f"set weight: {{{key}: {choice}}}"
    return None


def _shape_problem(scheme: Scheme, layer: nn.Linear) -> tuple[str, str] | None:
    spec = cast(QuantSpec, scheme.weight)
    shape = {"inputs": layer.in_features, "outputs": layer.out_features}
    for side, size in shape.items():
        if size * spec.num_bits % WORD:
            return f"its {size} {side} do not fill words of {WORD} bits with {spec.num_bits} bits each", "exclude it"
    return None


def quantized_places(model: nn.Module, schemes: Mapping[str, Scheme], layout: Layout) -> dict[str, Any]:
    """Return where a model is quantized, in the terms of the configs that readers expect.

    Returns:
        The path of the blocks ("blocks") and the names of the quantized layers in each of them ("names"), and the full
        names of all other linear layers ("others").

    Raises:
        QatkitError: the blocks are not alike, or a reader would mistake one layer for another.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    others = [name for name in linear if name not in schemes]
    return {
        **(_blocks(linear, schemes) if schemes and layout.name == "gptq" else {}),
        "others": _others(others, schemes),
    }


def _others(others: list[str], schemes: Mapping[str, Scheme]) -> list[str]:
    for name in others:  # readers of AWQ skip every layer whose name contains one of these
        if taken := next((quantized for quantized in schemes if name in quantized), None):
            raise QatkitError(
                f"layer '{name}' is not quantized, and its name is a part of that of the quantized layer '{taken}', "
                "which a reader would take for unquantized",
                advice=f"quantize both layers, or {INSTEAD}",
            )
    return others


def _blocks(linear: list[str], schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    found: dict[str, set[str]] = {}
    paths = set()
    for layer in linear:
        match = _BLOCK.fullmatch(layer)
        if match is not None:
            blocks, index, name = match.group("blocks", "index", "name")
            found.setdefault(f"{blocks}.{index}", set())
        if layer in schemes:
            if match is None:
                raise QatkitError(
                    f"layer '{layer}': readers of 'gptq' expect only quantized layers of repeated blocks",
                    advice=f"exclude the layer, or {INSTEAD}",
                )
            paths.add(blocks)
            found[f"{blocks}.{index}"].add(name)
    if len(paths) > 1:
        raise QatkitError(
            f"readers of 'gptq' expect one list of blocks, but layers of {' and '.join(sorted(paths))} are quantized",
            advice=INSTEAD,
        )
    path = next(iter(paths))
    names = sorted(set().union(*found.values()))
    for layer in linear:  # readers compare the ends of names
        expected = layer.startswith(f"{path}.") and any(layer.endswith(name) for name in names)
        if expected != (layer in schemes):
            raise QatkitError(
                f"layer '{layer}': readers of 'gptq' expect the same quantized layers in every block, but a layer of "
                "this name is quantized in another block only",
                advice=f"quantize or exclude the layer in every block, or {INSTEAD}",
            )
    return {"blocks": path, "names": names}
