"""Selection of the layers to prune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter

from qatkit.errors import QatkitError, did_you_mean

PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Prunable layer types. Subclasses such as fake-quantized layers count too: pruning only needs their weight."""


def prunable_layers(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Select linear and convolutional layers by globs over their names, in the model's order.

    Two layers that share a weight are listed once, under the first name.

    Args:
        model: Any module.
        include: Globs over layer names; every one must match a layer.
        exclude: Globs over layer names to exclude.

    Raises:
        QatkitError: a pattern matches no layer; no layer remains; or a weight is quantized, computed by a hook, or
            shared with an excluded layer or one of a different type.

    Example:
        >>> from torch import nn
        >>> list(prunable_layers(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), exclude=["2"]))
        ['0']
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE)}
    for key, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise QatkitError(f"'{patterns}' is not a list of patterns", key=key, advice=f"use ['{patterns}']")
        for index, pattern in enumerate(patterns):
            check_pattern(f"{key}[{index}]", pattern, list(layers))
    elsewhere = {
        id(parameter): name
        for name, module in model.named_modules()
        if name not in layers
        for parameter in module.parameters(recurse=False)
    }
    excluded = {id(_weight(layer)): name for name, layer in layers.items() if matches(name, exclude)}
    chosen: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, layer in layers.items():
        if matches(name, exclude) or not matches(name, include) or id(_weight(layer)) in seen:
            continue
        _check_weight(name, _weight(layer))
        if id(layer.weight) in elsewhere:
            raise QatkitError(
                f"layer '{name}' shares its weight with '{elsewhere[id(layer.weight)]}', which would also be pruned",
                advice="exclude the layer",
            )
        if id(layer.weight) in excluded:
            raise QatkitError(
                f"layer '{name}' shares its weight with '{excluded[id(layer.weight)]}', which is excluded",
                advice="exclude both layers, or neither",
            )
        seen.add(id(layer.weight))
        chosen[name] = layer
    if not chosen:
        raise QatkitError(
            f"include={list(include)} and exclude={list(exclude)} select no layer", advice="exclude fewer layers"
        )
    return chosen


def _weight(layer: nn.Module) -> object:
    # layers packed by compressed-tensors have no weight, only codes under other names
    return getattr(layer, "weight", None)


def _check_weight(name: str, weight: object) -> None:
    if isinstance(weight, UninitializedParameter):
        raise QatkitError(
            f"layer '{name}' is lazy and has no weight before its first batch",
            advice="run one batch through the model first",
        )
    if weight is not None and not isinstance(weight, nn.Parameter):
        raise QatkitError(
            f"the weight of layer '{name}' is computed by a hook (torch's prune, weight_norm or spectral_norm)",
            advice="make the weight permanent (prune.remove, remove_weight_norm), or exclude the layer",
        )
    # tensor subclasses of torchao and bitsandbytes report a float dtype for integer codes; FSDP2's shards are floats
    codes = weight is not None and type(weight) is not nn.Parameter and not hasattr(weight, "to_local")
    if weight is None or codes or not weight.is_floating_point() or weight.element_size() < 2:
        kind = "packed" if weight is None else type(weight).__name__ if codes else weight.dtype
        raise QatkitError(
            f"the weight of layer '{name}' is already quantized ({kind}), but pruning needs floats of at least 16 bits",
            advice="prune the model before quantizing it, or exclude the layer",
        )


def sparsity_of(name: str, by_glob: Mapping[str, float], default: float) -> float:
    """Return the sparsity of the last glob that matches the layer name, or the default if none does.

    Example:
        >>> sparsity_of("mlp.up", {"*": 0.5, "mlp.*": 0.8}, 0.9)
        0.8
    """
    return next((value for pattern, value in reversed(list(by_glob.items())) if matches(name, [pattern])), default)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Check whether any of the globs matches the name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_pattern(key: str, pattern: str, names: Sequence[str]) -> None:
    """Raise if a glob matches none of the layer names."""
    if not any(fnmatchcase(name, pattern) for name in names):
        raise QatkitError(
            f"'{pattern}' matches no linear or convolutional layer", key=key, advice=did_you_mean(pattern, names)
        )
