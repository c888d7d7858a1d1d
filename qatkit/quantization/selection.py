"""Layer selection: match layer names with globs, and determine the quantization of each selected layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qatkit.errors import QatkitError, QatkitWarning, did_you_mean, under
from qatkit.quantization.experts import expert_weights
from qatkit.quantization.kv_cache import attention_modules, check_kv_quantization
from qatkit.quantization.layer_checks import check_layer, check_ties
from qatkit.quantization.layers import SWAPS, QATLayer, swap_of
from qatkit.quantization.parts import QATParts
from qatkit.quantization.swaps import PARTS, parts_class
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
    """Select and check the layers to quantize, in model order, without changing the model.

    Only exact types are selected: a subclass (such as a bitsandbytes `Linear4bit`) uses its weight differently, and a
    swapped layer would silently compute different outputs. The ``out_proj`` of `nn.MultiheadAttention` is a separate
    layer. Embeddings must be listed explicitly: globs whose last component is ``*``, such as ``*`` or ``model.*``, do
    not select them.

    Args:
        model: Any module.
        weight: Quantization of weights, unless `layers` overrides it.
        activation: Quantization of inputs, unless `layers` overrides it.
        include: Globs over layer names; each must match a layer.
        exclude: Globs over names of layers to leave unquantized; each must match a layer.
        layers: Quantization by glob; the last matching glob wins.
        kv_cache: Quantization of the KV cache, which is only checked here.

    Raises:
        QatkitError: A glob matches no layer or a layer that cannot be quantized, a group size does not divide a layer's
            inputs, or a weight is non-finite.
    """
    layers = layers or {}
    check_arguments(weight, activation, include, exclude, layers, kv_cache)
    default = Scheme(weight, activation)
    if kv_cache is not None:
        check_kv_cache(kv_cache)
        check_kv_quantization(model, exclude)
        if default == Scheme() and not layers:
            _check_kv_patterns(model, include, exclude)
            return {}
    if default == Scheme():
        if not layers:
            raise QatkitError(
                "neither weight nor activation is quantized", key="weight", advice="pass weight=QuantSpec(num_bits=8)"
            )
        include = ()
    candidates, others = _candidates(model)
    known = [*candidates, *others]
    excluded = {name for name in known if any(fnmatchcase(name, pattern) for pattern in exclude)}
    named = [(f"include[{index}]", pattern) for index, pattern in enumerate(include)]
    named += [(f"layers['{pattern}']", pattern) for pattern in layers]
    patterns = [pattern for _, pattern in named]
    for name, module in others.items():
        if isinstance(module, QATLayer | QATParts) and name not in excluded and _matches(name, module, patterns):
            raise QatkitError(
                f"layer '{name}' is already fake-quantized", advice="exclude the layer, or call strip_qat(model) first"
            )
    for key, pattern in named:
        _check_pattern(key, pattern, candidates, others, must_fit=True)
    attention = dict(attention_modules(model)) if kv_cache is not None else {}
    for index, pattern in enumerate(exclude):
        _check_pattern(f"exclude[{index}]", pattern, candidates | attention, others, must_fit=False)
    chosen: Selection = {}
    keys: dict[str, str] = {}
    for name, module in candidates.items():
        if name in excluded or not _matches(name, module, patterns):
            continue
        glob = next((pattern for pattern in reversed(list(layers)) if _matches(name, module, [pattern])), None)
        scheme = default if glob is None else layers[glob]
        if scheme != Scheme():
            chosen[name] = scheme
            keys[name] = "" if glob is None else f"layers['{glob}']"
    if not chosen:
        raise QatkitError(
            f"include={list(include)} and exclude={list(exclude)} select no layer", key="exclude",
            advice="exclude fewer layers",
        )  # fmt: skip
    _warn_of_skipped(model, others, excluded, patterns)
    check_ties(model, chosen)
    for name, scheme in chosen.items():
        with under(keys[name]):
            check_layer(name, candidates[name], scheme)
    return chosen


def check_arguments(
    weight: object,
    activation: object,
    include: Sequence[str],
    exclude: Sequence[str],
    layers: Mapping[str, object],
    kv_cache: object,
) -> None:
    """Check the types of the arguments that `prepare_qat` and the callback have in common."""
    for name, spec in (("weight", weight), ("activation", activation), ("kv_cache", kv_cache)):
        if isinstance(spec, Scheme):
            raise QatkitError(
                "expected a QuantSpec, but got a Scheme, which has a weight spec and an activation spec",
                key=name,
                advice="pass weight=SCHEME.weight, activation=SCHEME.activation",
            )
        if spec is not None and not isinstance(spec, QuantSpec):
            raise QatkitError(f"{spec!r} is not a QuantSpec", key=name, advice="pass QuantSpec(num_bits=8)")
    for name, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise QatkitError(f"'{patterns}' is not a list of globs", key=name, advice=f"pass ['{patterns}']")
    for glob, scheme in layers.items():
        if not isinstance(scheme, Scheme):
            raise QatkitError(
                f"{scheme!r} is not a Scheme", key=f"layers['{glob}']",
                advice="pass scheme('W8A16') or Scheme(weight=QuantSpec(num_bits=8))",
            )  # fmt: skip


def _check_kv_patterns(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Check the globs if only keys and values are quantized."""
    if list(include) != ["*"]:
        raise QatkitError(
            f"{list(include)} has no effect if only kv_cache is quantized", key="include", advice="remove include"
        )
    for index, pattern in enumerate(exclude):
        _check_pattern(f"exclude[{index}]", pattern, dict(attention_modules(model)), {}, must_fit=False)


def _candidates(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return the layers that can be quantized, and the other modules that hold parameters."""
    candidates: dict[str, nn.Module] = {}
    others: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if _is_candidate(model, name, module):
            candidates[name] = module
        elif name and (hasattr(module, "weight") or next(module.parameters(recurse=False), None) is not None):
            others[name] = module
    return candidates, others


def _is_candidate(model: nn.Module, name: str, module: nn.Module) -> bool:
    if type(module) is NonDynamicallyQuantizableLinear:  # read by its parent, which has to be one that is swapped too
        parent = model.get_submodule(name.rpartition(".")[0])
        return type(parent) in (nn.MultiheadAttention, PARTS[nn.MultiheadAttention])
    return swap_of(type(module)) is not None or parts_class(module) is not None


def _matches(name: str, module: nn.Module, patterns: Iterable[str]) -> bool:
    explicit = isinstance(module, nn.Embedding | nn.EmbeddingBag)
    return any(
        fnmatchcase(name, pattern) and not (explicit and set(pattern.rpartition(".")[2]) <= {"*", "?"})
        for pattern in patterns
    )


def _check_pattern(
    key: str, pattern: str, candidates: Mapping[str, nn.Module], others: Mapping[str, nn.Module], must_fit: bool
) -> None:
    if any(fnmatchcase(name, pattern) for name in candidates):
        return
    matched = [name for name in others if fnmatchcase(name, pattern)]
    if matched and must_fit:
        kinds = ", ".join(sorted(kind.__name__ for kind in (*SWAPS, *PARTS)))
        raise QatkitError(
            f"'{pattern}' selects '{matched[0]}', a {type(others[matched[0]]).__name__}, which cannot be quantized "
            f"(only {kinds}, transformers' Conv1D and fused experts can)", key=key, advice="remove the pattern",
        )  # fmt: skip
    if not matched:
        raise QatkitError(f"'{pattern}' matches no layer", key=key, advice=did_you_mean(pattern, candidates))


def _warn_of_skipped(
    model: nn.Module, others: Mapping[str, nn.Module], excluded: set[str], patterns: Sequence[str]
) -> None:
    skipped = {
        name: module
        for name, module in others.items()
        if _has_weight_matrix(module) and name not in excluded and _matches(name, module, patterns)
    }
    if not skipped:
        return
    names = [f"{name} ({type(module).__name__})" for name, module in skipped.items()]
    left, total = (
        sum(weight.numel() for weight in _matrices(modules)) for modules in (skipped.values(), model.modules())
    )
    warnings.warn(
        f"not quantized, because these types are not supported: {', '.join(names[:8])}"
        f"{f' and {len(names) - 8} more' if len(names) > 8 else ''}; they contain "
        f"{100 * left / max(total, 1):.1f}% of the model's weights; to silence this warning, add them to exclude",
        QatkitWarning,
        stacklevel=4,
    )


def _matrices(modules: Iterable[nn.Module]) -> Iterable[nn.Parameter]:
    """Return the parameters of at least two dimensions that belong to the modules themselves, each once."""
    own = (parameter for module in modules for parameter in module.parameters(recurse=False))
    return {id(parameter): parameter for parameter in own if parameter.dim() >= 2}.values()


def _has_weight_matrix(module: nn.Module) -> bool:
    """Whether a module belongs to the types that hold most weights of a model."""
    kinds = (*SWAPS, *PARTS, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
    # experts that transformers does not mark have one matrix each, unlike embeddings of tokens or positions
    return isinstance(module, kinds) or any(min(weight.shape) > 1 for _, weight in expert_weights(module))
