"""Which layers of a model are quantized, and how: globs over layer names, and every check before anything changes."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.quantization.experts import QATExperts, expert_weights, is_experts
from qatkit.quantization.kv_cache import attention_modules, check_kv_quantization
from qatkit.quantization.layers import SWAPS, QATLayer, swap_of
from qatkit.schemes import Scheme, check_kv_cache
from qatkit.spec import QuantSpec

Selection = dict[str, Scheme]


def select(
    model: nn.Module,
    weight: QuantSpec | None = None,
    activation: QuantSpec | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    layers: Mapping[str, Scheme] | None = None,
    kv_cache: QuantSpec | None = None,
) -> Selection:
    """The layers that are to be quantized and how, in the model's order; nothing is changed.

    Only exact types are taken: a subclass (a bitsandbytes `Linear4bit`, the `out_proj` of `nn.MultiheadAttention`)
    computes something else with its weight, and swapping it would be silently wrong. An embedding is only taken by a
    pattern that names it: the last part of ``*`` or ``model.*`` names every layer, and none in particular.

    Args:
        model: Any module.
        weight: How weights are quantized, unless `layers` says otherwise.
        activation: How inputs are quantized, unless `layers` says otherwise.
        include: Globs over layer names; every one must match a layer.
        exclude: Globs over layer names that are left alone; every one must match a layer.
        layers: By glob, what is quantized otherwise; of several that match a layer the last decides.
        kv_cache: How keys and values are quantized; only checked here.

    Raises:
        QatkitError: a pattern selects nothing or a layer that cannot be quantized, a size does not divide, or a weight
            is not finite.
    """
    layers = layers or {}
    check_arguments(weight, activation, include, exclude, layers, kv_cache)
    default = Scheme(weight, activation)
    if kv_cache is not None:
        check_kv_cache(kv_cache)
        check_kv_quantization(model, exclude)
        if default == Scheme() and not layers:
            if list(include) != ["*"]:
                raise QatkitError(f"include: {list(include)} has no meaning with kv_cache alone; leave it out")
            for index, pattern in enumerate(exclude):
                _check_pattern(f"exclude[{index}]", pattern, dict(attention_modules(model)), {}, must_fit=False)
            return {}
    if default == Scheme():
        if not layers:
            raise QatkitError("prepare_qat: neither weight nor activation is given; write weight=QuantSpec(num_bits=8)")
        include = ()
    fits, foreign = _candidates(model)
    known = [*fits, *foreign]
    excluded = {name for name in known if any(fnmatchcase(name, pattern) for pattern in exclude)}
    named = [(f"include[{index}]", pattern) for index, pattern in enumerate(include)]
    named += [(f"layers['{pattern}']", pattern) for pattern in layers]
    patterns = [pattern for _, pattern in named]
    for name, module in foreign.items():
        if isinstance(module, QATLayer | QATExperts) and name not in excluded and _matches(name, module, patterns):
            raise QatkitError(f"layer '{name}' is already fake-quantized; exclude it, or call strip_qat(model) first")
    for key, pattern in named:
        _check_pattern(key, pattern, fits, foreign, must_fit=True)
    attention = dict(attention_modules(model)) if kv_cache is not None else {}
    for index, pattern in enumerate(exclude):
        _check_pattern(f"exclude[{index}]", pattern, fits | attention, foreign, must_fit=False)
    chosen: Selection = {}
    for name, module in fits.items():
        if name in excluded or not _matches(name, module, patterns):
            continue
        scheme = default
        for pattern, own in layers.items():
            scheme = own if _matches(name, module, [pattern]) else scheme
        if scheme != Scheme():
            chosen[name] = scheme
    if not chosen:
        raise QatkitError(f"include {list(include)} minus exclude {list(exclude)} leaves no layer to quantize")
    _warn_of_missed(foreign, excluded, patterns)
    _check_ties(model, chosen)
    for name, scheme in chosen.items():
        _check(name, fits[name], scheme)
    return chosen


def check_arguments(
    weight: object,
    activation: object,
    include: Sequence[str],
    exclude: Sequence[str],
    layers: Mapping[str, object],
    kv_cache: object,
) -> None:
    """Refuse what `prepare_qat` and the callback cannot take, such as a scheme where a spec is expected."""
    for name, spec in (("weight", weight), ("activation", activation), ("kv_cache", kv_cache)):
        if isinstance(spec, Scheme):
            raise QatkitError(f"{name}: a scheme holds two specs; write weight=w8a8.weight, activation=w8a8.activation")
        if spec is not None and not isinstance(spec, QuantSpec):
            raise QatkitError(f"{name}: {spec!r} is no QuantSpec; write QuantSpec(num_bits=8)")
    for name, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise QatkitError(f"{name}: '{patterns}' is no list of patterns; write ['{patterns}']")
    for glob, how in layers.items():
        if not isinstance(how, Scheme):
            raise QatkitError(
                f"layers['{glob}']: {how!r} is no Scheme; write scheme('W8A16') or Scheme(weight=QuantSpec(num_bits=8))"
            )


def _candidates(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Layers that can be quantized, and other modules that hold parameters."""
    fits: dict[str, nn.Module] = {}
    foreign: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if swap_of(type(module)) is not None or is_experts(module):
            fits[name] = module
        elif name and (hasattr(module, "weight") or next(module.parameters(recurse=False), None) is not None):
            foreign[name] = module
    return fits, foreign


def _matches(name: str, module: nn.Module, patterns: Sequence[str]) -> bool:
    explicit = isinstance(module, nn.Embedding)
    return any(
        fnmatchcase(name, pattern) and not (explicit and set(pattern.rpartition(".")[2]) <= {"*", "?"})
        for pattern in patterns
    )


def _check_pattern(
    key: str, pattern: str, fits: Mapping[str, nn.Module], foreign: Mapping[str, nn.Module], must_fit: bool
) -> None:
    if any(fnmatchcase(name, pattern) for name in fits):
        return
    others = [name for name in foreign if fnmatchcase(name, pattern)]
    if others and must_fit:
        kinds = ", ".join(sorted(kind.__name__ for kind in SWAPS))
        raise QatkitError(
            f"{key}: '{pattern}' selects '{others[0]}', a {type(foreign[others[0]]).__name__}, which cannot be "
            f"quantized (only {kinds}, transformers' Conv1D and fused experts can); leave it out"
        )
    if not others:
        near = difflib.get_close_matches(pattern, fits, n=3, cutoff=0.3) or list(fits)[:3]
        known = f"the nearest are {near}" if near else "the model has no layer that can be quantized"
        raise QatkitError(f"{key}: '{pattern}' matches no layer; {known}")


def _warn_of_missed(foreign: Mapping[str, nn.Module], excluded: set[str], patterns: Sequence[str]) -> None:
    missed = [
        f"{name} ({type(module).__name__})"
        for name, module in foreign.items()
        if _multiplies(module) and name not in excluded and _matches(name, module, patterns)
    ]
    if missed:
        warnings.warn(
            f"not quantized, because their types are not plain layers: {', '.join(missed[:8])}"
            f"{f' and {len(missed) - 8} more' if len(missed) > 8 else ''}; name them in exclude if that is meant",
            QatkitWarning,
            stacklevel=4,
        )


def _multiplies(module: nn.Module) -> bool:
    """Whether a module is of the kinds that hold most weights of a model: what a glob passes over ships unquantized."""
    kinds = (*SWAPS, nn.modules.conv._ConvNd, nn.RNNBase)
    # experts that transformers does not mark: one matrix for each, which a token or a position never is
    return isinstance(module, kinds) or any(min(weight.shape) > 1 for _, weight in expert_weights(module))


def _check_ties(model: nn.Module, chosen: Selection) -> None:
    """Two layers that hold one weight may be quantized alike, or one of them: two roundings of it are two weights."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or name not in chosen:
            continue
        first = owners.setdefault(id(weight), name)
        if chosen[first].weight != chosen[name].weight:
            raise QatkitError(
                f"layers '{first}' and '{name}' are tied: they hold one weight, and would quantize it in two ways; "
                "give both the same weight spec, or exclude one"
            )


def _check(name: str, layer: nn.Module, scheme: Scheme) -> None:
    weights = expert_weights(layer) if is_experts(layer) else [("", cast(Tensor, layer.weight))]
    for part, weight in weights:
        _check_weight(f"{name}.{part}" if part else name, layer, weight, scheme)
    if scheme.activation is None:
        return
    if is_experts(layer) or isinstance(layer, nn.Embedding):
        what = (
            "fused experts route their inputs inside"
            if is_experts(layer)
            else "an embedding's inputs are whole numbers"
        )
        raise QatkitError(
            f"layer '{name}': {what}, so only its weight can be quantized; give it an entry of its own in layers "
            "with a weight alone, or exclude it"
        )
    if scheme.activation.strategy == "token" and weights[0][1].dim() != 2:
        raise QatkitError(
            f"layer '{name}': strategy 'token' is for linear layers, whose last dimension is a token's; "
            "use strategy: tensor, or exclude the layer"
        )
    size = scheme.activation.group_size
    if size is not None and (weights[0][1].dim() != 2 or _inputs(layer) % size):
        raise QatkitError(
            f"layer '{name}': activation.group_size {size} does not divide its {_inputs(layer)} inputs; "
            "exclude the layer"
        )


def _inputs(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    kind = swap_of(type(layer))
    return weight.shape[0] if kind is not None and kind.transposed else weight.shape[1]


def _check_weight(name: str, layer: nn.Module, weight: Tensor, scheme: Scheme) -> None:
    if not isinstance(weight, nn.Parameter):
        raise QatkitError(
            f"layer '{name}': its weight is computed by a hook (torch's prune, weight_norm or spectral_norm); "
            "make it permanent (prune.remove, remove_weight_norm), or exclude the layer"
        )
    if weight.numel() == 0:
        raise QatkitError(f"layer '{name}': its weight of shape {list(weight.shape)} is empty; exclude it")
    if not weight.is_meta and not weight.isfinite().all():
        raise QatkitError(f"layer '{name}': its weight holds NaN or infinite values; mend the checkpoint first")
    if isinstance(layer, nn.Embedding) and layer.sparse:
        raise QatkitError(f"layer '{name}': an embedding with sparse gradients cannot be quantized; write sparse=False")
    spec = scheme.weight
    if spec is not None and is_experts(layer) and spec.strategy in ("tensor", "block"):
        raise QatkitError(
            f"layer '{name}': every expert is scaled on its own, so strategy '{spec.strategy}' over all of them is "
            "another model; write strategy: channel or group in an entry of its own in layers"
        )
    if spec is None or spec.strategy not in ("group", "block"):
        return
    if weight.dim() > 2 and not is_experts(layer):
        raise QatkitError(
            f"layer '{name}': strategy '{spec.strategy}' is for linear layers, not for weights of shape "
            f"{list(weight.shape)}; use strategy: channel, or exclude the layer"
        )
    if spec.group_size is None:
        return
    size = weight.shape[1 if layer.is_transposed else 2] if is_experts(layer) else _inputs(layer)
    if size % spec.group_size:
        fitting = [n for n in range(4, size + 1) if size % n == 0][:8]
        raise QatkitError(
            f"layer '{name}': group_size {spec.group_size} does not divide its {size} inputs; write one of {fitting}"
        )
