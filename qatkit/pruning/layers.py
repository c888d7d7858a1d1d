"""Which layers are pruned."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter

from qatkit.errors import QatkitError

PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""And what is derived from them, as fake-quantized layers are: pruning needs their weight alone, not their forward."""


def prunable_layers(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """The linear and convolutional layers that the globs select, by name, in the model's order.

    Two layers with one weight are one: it counts under the first name.

    Raises:
        QatkitError: a pattern matches no layer, nothing is left, or a weight is quantized, is computed by a hook or is
            used by another kind of layer or by an excluded one too.

    Example:
        >>> from torch import nn
        >>> list(prunable_layers(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), exclude=["2"]))
        ['0']
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE)}
    for key, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise QatkitError(f"{key}: '{patterns}' is no list of patterns; write ['{patterns}']")
        for index, pattern in enumerate(patterns):
            check_pattern(f"{key}[{index}]", pattern, list(layers))
    elsewhere = {
        id(parameter): name
        for name, module in model.named_modules()
        if name not in layers
        for parameter in module.parameters(recurse=False)
    }
    left_out = {id(_weight(layer)): name for name, layer in layers.items() if matches(name, exclude)}
    chosen: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, layer in layers.items():
        if matches(name, exclude) or not matches(name, include) or id(_weight(layer)) in seen:
            continue
        _check_weight(name, _weight(layer))
        if id(layer.weight) in elsewhere:
            raise QatkitError(
                f"layer '{name}': its weight is also that of '{elsewhere[id(layer.weight)]}', which would be pruned "
                "with it; exclude the layer"
            )
        if id(layer.weight) in left_out:
            raise QatkitError(
                f"layer '{name}': its weight is also that of '{left_out[id(layer.weight)]}', which is excluded and "
                "would be pruned with it; exclude both, or neither"
            )
        seen.add(id(layer.weight))
        chosen[name] = layer
    if not chosen:
        raise QatkitError(f"include {list(include)} minus exclude {list(exclude)} leaves no layer to prune")
    return chosen


def _weight(layer: nn.Module) -> object:
    # layers that compressed-tensors has packed have codes under other names alone
    return getattr(layer, "weight", None)


def _check_weight(name: str, weight: object) -> None:
    if isinstance(weight, UninitializedParameter):
        raise QatkitError(f"layer '{name}': it has no weight before its first batch; run one through the model before")
    if weight is not None and not isinstance(weight, nn.Parameter):
        raise QatkitError(
            f"layer '{name}': its weight is computed by a hook (torch's prune, weight_norm or spectral_norm); make "
            "it permanent (prune.remove, remove_weight_norm), or exclude the layer"
        )
    # tensor subclasses of torchao and bitsandbytes say that their codes are floats; FSDP2's shards are floats
    codes = weight is not None and type(weight) is not nn.Parameter and not hasattr(weight, "to_local")
    if weight is None or codes or not weight.is_floating_point() or weight.element_size() < 2:
        kind = "packed" if weight is None else type(weight).__name__ if codes else weight.dtype
        raise QatkitError(
            f"layer '{name}': its weight is {kind}, no float of 16 bits or more: it is quantized already; prune the "
            "model before it is quantized, or exclude the layer"
        )


def share_of(name: str, shares: Mapping[str, float], default: float) -> float:
    """The share of the last glob that matches the name, or the default where none does."""
    return next((share for pattern, share in reversed(list(shares.items())) if matches(name, [pattern])), default)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether any of the globs matches the name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_pattern(key: str, pattern: str, names: Sequence[str]) -> None:
    """Raise if a glob matches no layer."""
    if not any(fnmatchcase(name, pattern) for name in names):
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
        known = f"the nearest are {near}" if near else "the model has no linear or convolutional layer"
        raise QatkitError(f"{key}: '{pattern}' matches no layer that can be pruned; {known}")
