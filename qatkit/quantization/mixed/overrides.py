"""Convert an allocation to the `layers` overrides of `prepare_qat` or of a recipe's ``quantize`` block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

from qatkit.quantization.mixed.records import Sensitivity
from qatkit.schemes import SCHEMES, Scheme
from qatkit.spec import QuantSpec


def allocated_layers(sensitivity: Sensitivity, allocation: Mapping[str, str]) -> dict[str, Scheme]:
    """Return the `layers` argument of `prepare_qat` for an allocation.

    Layers whose names differ only in numbers are merged into one glob if this shortens the result and the glob matches
    no other layer of the model. Exceptions follow the glob, because the last matching glob wins.

    Args:
        sensitivity: The measurement on which the allocation is based.
        allocation: The result of `allocate`, possibly edited.
    """
    formats = {layer: allocation[group.name] for group in sensitivity.groups for layer in group.layers}
    families: dict[str, list[str]] = {}
    for layer in formats:
        families.setdefault(family_name(layer), []).append(layer)
    layers: dict[str, Scheme] = {}
    for glob, family in families.items():
        usual, times = Counter(formats[layer] for layer in family).most_common(1)[0]
        caught = {name for name in (*formats, *sensitivity.others) if fnmatchcase(name, glob)}
        joined = times > 1 and caught == set(family)
        if joined:
            layers[glob] = sensitivity.candidates[usual]
        layers |= {
            escape(layer): sensitivity.candidates[formats[layer]]
            for layer in family
            if not joined or formats[layer] != usual
        }
    return layers


def family_name(layer: str) -> str:
    """Return the glob of the layers whose names differ from a layer's only in numbers.

    Example:
        >>> family_name("blocks.3.up")
        'blocks.*.up'
    """
    *parents, own = layer.split(".")
    return ".".join(["*" if part.isdecimal() else escape(part) for part in parents] + [escape(own)])


def plain_layers(layers: Mapping[str, Scheme]) -> dict[str, dict[str, Any]]:
    """Return overrides as plain data for a recipe: scheme names, or specs without default values."""
    return {glob: _plain_scheme(scheme) for glob, scheme in layers.items()}


def _plain_scheme(scheme: Scheme) -> dict[str, Any]:
    if (name := next((name for name, known in SCHEMES.items() if known == scheme), None)) is not None:
        return {"scheme": name}
    sides = {"weight": scheme.weight, "activation": scheme.activation}
    return {side: _plain_spec(spec) for side, spec in sides.items() if spec is not None}


def _plain_spec(spec: QuantSpec) -> dict[str, Any]:
    given = {field.name: getattr(spec, field.name) for field in fields(spec)}
    kept = {f.name: given[f.name] for f in fields(spec) if f.name == "num_bits" or given[f.name] != f.default}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
