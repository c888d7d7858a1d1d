"""Quantizations that have a name in the ecosystem: compressed-tensors' presets and GGUF's grids."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from qatkit.errors import QatkitError
from qatkit.spec import Observer, QuantSpec


@dataclass(frozen=True)
class Scheme:
    """How a layer's weight and its input are quantized; None leaves either as it is.

    Raises:
        QatkitError: a spec cannot be used on the side it stands on.
    """

    weight: QuantSpec | None = None
    activation: QuantSpec | None = None

    def __post_init__(self) -> None:
        weight, activation = self.weight, self.activation
        if weight is not None and weight.strategy == "token":
            raise QatkitError("weight.strategy: 'token' is for activations; write tensor, channel or group")
        if weight is not None and weight.observer in ("moving_average", "percentile", "kl"):
            raise QatkitError(f"weight.observer: '{weight.observer}' is for activations; write minmax, mse or lsq")
        if activation is not None:
            check_activation("activation", activation)


def check_activation(key: str, spec: QuantSpec) -> None:
    """Refuse a spec that only weights can have; the error starts with `key`."""
    if spec.strategy in ("channel", "block"):
        raise QatkitError(
            f"{key}.strategy: '{spec.strategy}' is for weights; write tensor (static, calibrated), or token or group "
            "(dynamic)"
        )
    if spec.strategy == "group" and spec.observer != "minmax":
        raise QatkitError(
            f"{key}.observer: '{spec.observer}' cannot be used with strategy 'group', whose scales are computed from "
            "each group as it comes; write observer: minmax"
        )
    if spec.type == "ternary":
        raise QatkitError(f"{key}.type: 'ternary' is for weights; write int or float")


def check_kv_cache(spec: QuantSpec) -> None:
    """Refuse what a cache of keys and values cannot have: it holds them per tensor or per token."""
    if spec.strategy not in ("tensor", "token"):
        raise QatkitError(f"kv_cache.strategy: '{spec.strategy}' is not for caches; write tensor or token")
    check_activation("kv_cache", spec)


def _int_weight(bits: int) -> QuantSpec:
    return QuantSpec(num_bits=bits, strategy="group", group_size=128, scale_rule="range")


_INT8_CHANNEL = QuantSpec(num_bits=8, scale_rule="range")
_INT8_TOKEN = QuantSpec(num_bits=8, strategy="token", scale_rule="range")
_INT4_TOKEN = replace(_INT8_TOKEN, num_bits=4)
_FP8_TENSOR = QuantSpec(num_bits=8, type="float", strategy="tensor")
_FP8_CHANNEL = replace(_FP8_TENSOR, strategy="channel")
_FP8_TOKEN = replace(_FP8_TENSOR, strategy="token")
_FP8_GROUP = replace(_FP8_TENSOR, strategy="group", group_size=128)
_FP8_BLOCK = replace(_FP8_TENSOR, strategy="block", block_structure=(128, 128))
_NVFP4 = QuantSpec(num_bits=4, type="float", strategy="group", group_size=16, scale_dtype="float8_e4m3fn")


def _mx(bits: int) -> QuantSpec:
    return QuantSpec(num_bits=bits, type="float", strategy="group", group_size=32, scale_dtype="float8_e8m0fnu")


_GGUF = QuantSpec(strategy="group", group_size=32, scale_dtype="float16")
_Q8_0 = replace(_GGUF, num_bits=8)
_Q4_0 = replace(_GGUF, num_bits=4, scale_rule="signed")

SCHEMES: dict[str, Scheme] = {
    "W8A8": Scheme(_INT8_CHANNEL, _INT8_TOKEN),
    "INT8": Scheme(_INT8_CHANNEL, _INT8_TOKEN),
    **{f"W{bits}A16": Scheme(_int_weight(bits)) for bits in range(2, 9)},
    **{f"W{bits}A8": Scheme(_int_weight(bits), _INT8_TOKEN) for bits in range(2, 8)},
    **{f"W{bits}A4": Scheme(_int_weight(bits), _INT4_TOKEN) for bits in range(2, 5)},
    "W4A16_ASYM": Scheme(QuantSpec(num_bits=4, symmetric=False, strategy="group", group_size=128)),
    "W4AFP8": Scheme(_int_weight(4), _FP8_TOKEN),
    "FP8": Scheme(_FP8_TENSOR, _FP8_TENSOR),
    "FP8_DYNAMIC": Scheme(_FP8_CHANNEL, _FP8_TOKEN),
    "FP8_BLOCK": Scheme(_FP8_BLOCK, _FP8_GROUP),
    "NVFP4": Scheme(_NVFP4, _NVFP4),
    "NVFP4A16": Scheme(_NVFP4),
    "MXFP4": Scheme(_mx(4), _mx(4)),
    "MXFP4A16": Scheme(_mx(4)),
    "MXFP4XFP8": Scheme(_mx(4), _FP8_GROUP),
    "MXFP6A16": Scheme(_mx(6)),
    "MXFP6A8": Scheme(_mx(6), _mx(8)),
    "MXFP8": Scheme(_mx(8), _mx(8)),
    "MXFP8A16": Scheme(_mx(8)),
    "Q4_0": Scheme(_Q4_0),
    "Q8_0": Scheme(_Q8_0),
}


def scheme(name: str, observer: Observer | None = None) -> Scheme:
    """The quantization that a name of compressed-tensors (`W4A16`, `FP8_DYNAMIC`, ...) or GGUF (`Q4_0`) stands for.

    GGUF's names are the exact grids: blocks of 32, float16 scales, their scale rule; so a model that is trained on one
    loses nothing when it is converted.

    Args:
        name: In any case.
        observer: Where the weight's scale comes from, such as "lsq"; a name says nothing of that, so it is the range.

    Raises:
        QatkitError: the name is unknown, or the observer does not fit.

    Example:
        >>> scheme("W4A16").weight.group_size
        128
    """
    if name.upper() not in SCHEMES:
        near = difflib.get_close_matches(name.upper(), SCHEMES, n=3, cutoff=0.4) or list(SCHEMES)
        raise QatkitError(f"scheme: '{name}' is unknown; write one of {', '.join(near)}")
    found = SCHEMES[name.upper()]
    if observer is None or found.weight is None:
        return found
    return replace(found, weight=replace(found.weight, observer=observer))
