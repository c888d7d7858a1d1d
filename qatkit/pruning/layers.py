"""Selection of the layers to prune."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter

from qatkit.errors import QatkitError, QatkitWarning, did_you_mean

PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Prunable layer types, including subclasses such as fake-quantized layers: pruning needs only their weight."""


LISTED = 8
"""Maximum number of layers that a warning lists by name."""


def prunable_layers(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Select linear and convolutional layers by globs over their names, in the model's order.

    Layers that share a weight are listed once, under the first name.

    Args:
        model: Any module.
        include: Globs over layer names; each must match a layer.
        exclude: Globs over layer names to exclude.

    Raises:
        QatkitError: a pattern matches no layer; no layer remains; or a weight is quantized, computed by a hook, or
            shared with an excluded layer or a layer of a different type.

    Example:
        >>> from torch import nn
        >>> list(prunable_layers(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), exclude=["2"]))
        ['0']
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE)}
    for key, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise QatkitError(f"'{patterns}' is not a list of patterns", key=key, advice=f"use ['{patterns}']")
        # a layer that cannot be pruned may be excluded, which silences `warn_of_unprunable`
        known = [*layers, *_unprunable(model)] if key == "exclude" and patterns else list(layers)
        for index, pattern in enumerate(patterns):
            check_pattern(f"{key}[{index}]", pattern, known)
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


def warn_of_unprunable(model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> None:
    """Warn about selected layers that stay dense because pruning does not support their type.

    They are found by the names of their parameters, which contain ``weight`` or end with ``_proj``: for example,
    ConvTranspose, recurrent layers, the input projections of `nn.MultiheadAttention`, and the Conv1D and fused experts
    of transformers. Embeddings and normalization layers are never pruned, so they are not listed.

    Args:
        model: Any module.
        include: Globs over layer names, as in `prunable_layers`.
        exclude: Globs over layer names to exclude.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_of_unprunable(nn.Sequential(nn.Linear(4, 4, bias=False), nn.ConvTranspose2d(4, 3, 2, bias=False)))
        >>> str(caught[0].message).partition(";")[0]
        'not pruned, because these types are not supported: 1 (ConvTranspose2d) (75.0% of the weights)'
    """
    skipped = {
        name: parameters
        for name, parameters in _unprunable(model).items()
        if matches(name, include) and not matches(name, exclude)
    }
    if not skipped:
        return
    modules = dict(model.named_modules())
    names = [f"{name} ({type(modules[name]).__name__})" for name in skipped]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    left = sum({id(each): each.numel() for part in skipped.values() for each in part}.values())
    total = sum({id(each): each.numel() for each in _initialized(model.parameters()) if each.dim() >= 2}.values())
    warnings.warn(
        f"not pruned, because these types are not supported: {', '.join(names[:LISTED])}{more} "
        f"({left / total:.1%} of the weights); to silence this warning, add the layers to exclude",
        QatkitWarning,
        stacklevel=2,
    )


def _unprunable(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The weight matrices of layers that are neither prunable nor embeddings, by name of the layer."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (*PRUNABLE, nn.Embedding, nn.EmbeddingBag, nn.LayerNorm)):
            continue
        own = [
            parameter
            for key, parameter in module.named_parameters(recurse=False)
            if not isinstance(parameter, UninitializedParameter)  # a lazy layer has no dimensions yet
            and parameter.dim() >= 2
            and ("weight" in key or key.endswith("_proj"))  # scales and positions do not count
        ]
        if own:
            found[name] = own
    return found


def _initialized(parameters: Iterable[nn.Parameter]) -> Iterator[nn.Parameter]:
    """Yield the parameters that have a shape; those of lazy layers have none before the first batch."""
    return (parameter for parameter in parameters if not isinstance(parameter, UninitializedParameter))


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
    """Return the sparsity of the last glob that matches the layer name, or the default if none matches.

    Example:
        >>> sparsity_of("mlp.up", {"*": 0.5, "mlp.*": 0.8}, 0.9)
        0.8
    """
    return next((value for pattern, value in reversed(list(by_glob.items())) if matches(name, [pattern])), default)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether any of the globs matches the name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_pattern(key: str, pattern: str, names: Sequence[str]) -> None:
    """Raise an error if a glob matches none of the layer names."""
    if not any(fnmatchcase(name, pattern) for name in names):
        raise QatkitError(
            f"'{pattern}' matches no linear or convolutional layer", key=key, advice=did_you_mean(pattern, names)
        )
