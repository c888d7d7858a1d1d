"""Swap a model's layers for fake-quantized ones, and back."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.quantization.modules import SWAPS, FakeQuantize, QATLayer
from qatkit.spec import QuantSpec


def prepare_qat(
    model: nn.Module,
    weight: QuantSpec | None = None,
    activation: QuantSpec | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> list[str]:
    """Make the selected layers of `model` compute with quantized weights and inputs, in place.

    Parameters keep their identity and their names, so optimizers, weight ties and checkpoints stay valid. Weight scales
    are set from the weights; static activation scales (`strategy="tensor"`) wait for `calibrate`.

    Args:
        model: Any module.
        weight: How weights are quantized; None leaves them as they are.
        activation: How each layer's input is quantized; None leaves it as it is.
        include: Globs over layer names; every one must match a layer.
        exclude: Globs over layer names that are left alone; every one must match a layer.

    Returns:
        The names of the swapped layers, in the model's order.

    Raises:
        QatkitError: a pattern selects nothing or a layer that cannot be quantized, a group size does not divide a
            layer's input, or a weight is not finite.

    Example:
        >>> from torch import nn
        >>> from qatkit import QuantSpec, prepare_qat
        >>> prepare_qat(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), weight=QuantSpec(num_bits=4))
        ['0', '2']
    """
    names = check_layers(model, weight, activation, include, exclude)
    for name in names:
        swap_layer(model.get_submodule(name), weight, activation)
    set_fast_paths(model)
    return names


def check_layers(
    model: nn.Module,
    weight: QuantSpec | None = None,
    activation: QuantSpec | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> list[str]:
    """Every check of `prepare_qat`, without changing the model; returns the names it would swap."""
    if weight is None and activation is None:
        raise QatkitError("prepare_qat: neither weight nor activation is given; write weight=QuantSpec(num_bits=8)")
    if activation is not None and activation.strategy not in ("tensor", "token"):
        raise QatkitError(
            f"activation.strategy: '{activation.strategy}' is for weights; write QuantSpec(..., strategy='tensor') for "
            "calibrated ranges or strategy='token' for dynamic ones"
        )
    if activation is not None and not activation.dynamic and activation.observer == "mse":
        raise QatkitError("activation.observer: 'mse' is for weights; write minmax or lsq")
    names = select_layers(model, include, exclude)
    for name in names:
        _check(name, model.get_submodule(name), weight, activation)
    return names


def set_fast_paths(model: nn.Module) -> None:
    """Keep torch's fused encoder layer, which computes with the raw weights in eval mode, off quantized children."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            quantized = any(isinstance(child, QATLayer) for child in module.children())
            known = {"relu": 1, "gelu": 2}.get(getattr(module.activation, "__name__", ""), 0)
            module.activation_relu_or_gelu = 0 if quantized else known


def strip_qat(model: nn.Module) -> list[str]:
    """Turn fake-quantized layers back into plain ones that hold the latent (unrounded) weights, in place.

    Returns:
        The names of the layers that changed.
    """
    plain: dict[type[nn.Module], type[nn.Module]] = {swapped: original for original, swapped in SWAPS.items()}
    names = [name for name, _ in qat_layers(model)]
    for name in names:
        layer = model.get_submodule(name)
        del layer.weight_fake_quant, layer.input_fake_quant
        layer.__class__ = plain[type(layer)]
    set_fast_paths(model)
    return names


def qat_layers(model: nn.Module) -> list[tuple[str, QATLayer]]:
    """The fake-quantized layers of a model, with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QATLayer)]


def fake_quantizers(model: nn.Module) -> list[tuple[str, FakeQuantize]]:
    """The fake quantizers of a model, with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, FakeQuantize)]


def select_layers(model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> list[str]:
    """Names of the layers that the globs select, in the model's order.

    Only exact types are taken: a subclass (a bitsandbytes `Linear4bit`, the `out_proj` of `nn.MultiheadAttention`)
    computes something else with its weight, and swapping it would be silently wrong.

    Raises:
        QatkitError: a pattern matches nothing, or names a layer that cannot be quantized.
    """
    fits, foreign = [], {}
    for name, module in model.named_modules():
        if type(module) in SWAPS:
            fits.append(name)
        elif isinstance(module, tuple(SWAPS)) or getattr(module, "weight", None) is not None:
            foreign[name] = type(module)
    excluded = {name for name in [*fits, *foreign] if any(fnmatchcase(name, p) for p in exclude)}
    for name, kind in foreign.items():
        if issubclass(kind, QATLayer) and name not in excluded and any(fnmatchcase(name, p) for p in include):
            raise QatkitError(f"layer '{name}' is already fake-quantized; exclude it, or call strip_qat(model) first")
    for key, patterns in (("include", include), ("exclude", exclude)):
        for index, pattern in enumerate(patterns):
            _check_pattern(f"{key}[{index}]", pattern, fits, foreign, must_fit=key == "include")
    chosen = [name for name in fits if name not in excluded and any(fnmatchcase(name, p) for p in include)]
    if not chosen:
        raise QatkitError(f"include {list(include)} minus exclude {list(exclude)} leaves no layer to quantize")
    missed = [
        f"{name} ({kind.__name__})"
        for name, kind in foreign.items()
        if issubclass(kind, tuple(SWAPS)) and name not in excluded and any(fnmatchcase(name, p) for p in include)
    ]
    if missed:
        warnings.warn(
            f"not quantized, because their types are not plain layers: {', '.join(missed[:8])}"
            f"{f' and {len(missed) - 8} more' if len(missed) > 8 else ''}; name them in exclude if that is meant",
            QatkitWarning,
            stacklevel=3,
        )
    return chosen


def _check_pattern(
    key: str, pattern: str, fits: list[str], foreign: dict[str, type[nn.Module]], must_fit: bool
) -> None:
    if any(fnmatchcase(name, pattern) for name in fits):
        return
    others = [name for name in foreign if fnmatchcase(name, pattern)]
    if others and must_fit:
        kinds = ", ".join(sorted(kind.__name__ for kind in SWAPS))
        raise QatkitError(
            f"{key}: '{pattern}' selects '{others[0]}', a {foreign[others[0]].__name__}, which cannot be quantized "
            f"(only {kinds} can); leave it out"
        )
    if not others:
        near = difflib.get_close_matches(pattern, fits, n=3, cutoff=0.3) or fits[:3]
        known = f"the nearest are {near}" if near else "the model has no layer that can be quantized"
        raise QatkitError(f"{key}: '{pattern}' matches no layer; {known}")


def _check(name: str, layer: nn.Module, weight: QuantSpec | None, activation: QuantSpec | None) -> None:
    parameter = layer.weight
    if not isinstance(parameter, nn.Parameter):
        raise QatkitError(
            f"layer '{name}': its weight is computed by a hook (torch's prune, weight_norm or spectral_norm); "
            "make it permanent (prune.remove, remove_weight_norm), or exclude the layer"
        )
    if parameter.numel() == 0:
        raise QatkitError(f"layer '{name}': its weight of shape {list(parameter.shape)} is empty; exclude it")
    if activation is not None and activation.dynamic and parameter.dim() != 2:
        raise QatkitError(
            f"layer '{name}': strategy 'token' is for linear layers, whose last dimension is a token's; "
            "use strategy: tensor, or exclude the layer"
        )
    if not parameter.is_meta and not parameter.isfinite().all():
        raise QatkitError(f"layer '{name}': its weight holds NaN or infinite values; mend the checkpoint first")
    if weight is None or weight.group_size is None:
        return
    if parameter.dim() != 2:
        raise QatkitError(
            f"layer '{name}': strategy 'group' is for linear layers, not for weights of shape {list(parameter.shape)}; "
            "use strategy: channel, or exclude the layer"
        )
    size = parameter.shape[1]
    if size % weight.group_size:
        fitting = [n for n in range(4, size + 1) if size % n == 0][:8]
        raise QatkitError(
            f"layer '{name}': group_size {weight.group_size} does not divide its {size} inputs; write one of {fitting}"
        )


def swap_layer(layer: nn.Module, weight: QuantSpec | None, activation: QuantSpec | None) -> None:
    """Make one plain layer compute with quantized values, in place."""
    parameter = layer.weight
    assert isinstance(parameter, nn.Parameter)
    layer.__class__ = SWAPS[type(layer)]
    layer.register_module("weight_fake_quant", None)
    layer.register_module("input_fake_quant", None)
    if weight is not None:
        fake_quant = FakeQuantize(weight, "weight", _scale_shape(parameter.shape, weight), parameter.device)
        if not parameter.is_meta:
            fake_quant.initialize(parameter)
        layer.weight_fake_quant = fake_quant
    if activation is not None:
        layer.input_fake_quant = FakeQuantize(activation, "activation", (1,), parameter.device)


def _scale_shape(shape: Sequence[int], spec: QuantSpec) -> tuple[int, ...]:
    if spec.strategy == "tensor":
        return (1,)
    return (shape[0], 1 if spec.group_size is None else shape[1] // spec.group_size)
