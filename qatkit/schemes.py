"""Named quantization schemes: compressed-tensors presets, GGUF's integer formats and MLX's affine mode."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qatkit.errors import QatkitError, did_you_mean
from qatkit.quantization.observers import OBSERVERS
from qatkit.spec import QuantSpec, ScaleRule


@dataclass(frozen=True)
class Scheme:
    """Quantization of a layer's weight and input; None leaves either unquantized.

    Raises:
        QatkitError: A spec is not supported for its role (weight or activation).
    """

    weight: QuantSpec | None = None
    activation: QuantSpec | None = None

    def __post_init__(self) -> None:
        weight = self.weight
        if weight is not None and weight.strategy == "token":
            raise QatkitError(
                "'token' is supported only for activations",
                key="weight.strategy",
                advice="use tensor, channel, group or block",
            )
        if weight is not None and not OBSERVERS[weight.observer].weights:
            raise QatkitError(
                f"'{weight.observer}' is supported only for activations",
                key="weight.observer",
                advice="use minmax, mse or lsq",
            )
        if weight is not None and weight.late_scales:
            raise QatkitError(
                f"'{weight.scale_dtype}' is supported only for activations", key="weight.scale_dtype",
                advice="use float16",
            )  # fmt: skip
        if weight is not None and weight.dynamic:
            raise QatkitError("true is supported only for activations", key="weight.dynamic", advice="remove dynamic")
        if self.activation is not None:
            check_activation("activation", self.activation)


def check_activation(key: str, spec: QuantSpec) -> None:
    """Raise an error for `key` if this spec is supported only for weights."""
    if spec.super_blocks:
        raise QatkitError(
            f"'{spec.scale_dtype}' is supported only for weights", key=f"{key}.scale_dtype", advice="remove scale_dtype"
        )
    if spec.strategy in ("channel", "block"):
        raise QatkitError(
            f"'{spec.strategy}' is supported only for weights", key=f"{key}.strategy",
            advice="use tensor (calibrated, or dynamic: true), or token or group (always dynamic)",
        )  # fmt: skip
    if spec.strategy == "group" and not OBSERVERS[spec.observer].dynamic:
        raise QatkitError(
            f"'{spec.observer}' is not supported with strategy 'group', whose scales are computed per group",
            key=f"{key}.observer", advice="use minmax",
        )  # fmt: skip
    if spec.element.weight_only:
        raise QatkitError(f"'{spec.type}' is supported only for weights", key=f"{key}.type", advice="use int or float")


def check_kv_cache(spec: QuantSpec) -> None:
    """Raise an error if this spec is not supported for a KV cache, whose scales are per-tensor or per-token."""
    if spec.strategy not in ("tensor", "token"):
        raise QatkitError(
            f"'{spec.strategy}' is not supported for the KV cache",
            key="kv_cache.strategy",
            advice="use tensor or token",
        )
    if spec.dynamic:
        raise QatkitError(
            "true is not supported for the KV cache, because the scale would change between steps",
            key="kv_cache.dynamic",
            advice="remove dynamic, or use strategy: token",
        )  # fmt: skip
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
_Q5_0 = replace(_GGUF, num_bits=5, scale_rule="signed")
_Q5_1 = replace(_GGUF, num_bits=5, symmetric=False, scale_rule="minimum")
_Q4_1 = replace(_Q5_1, num_bits=4)
_Q4_0 = replace(_GGUF, num_bits=4, scale_rule="signed")
_F16 = QuantSpec(num_bits=16, type="float16", strategy="tensor", observer="unit")
_K = replace(_GGUF, observer="mse")
_Q2_K = replace(_K, num_bits=2, symmetric=False, group_size=16, scale_dtype="uint4")
_Q3_K = replace(_K, num_bits=3, group_size=16, scale_dtype="int6")
_Q4_K = replace(_K, num_bits=4, symmetric=False, scale_dtype="uint6")
_Q5_K = replace(_Q4_K, num_bits=5)
_Q6_K = replace(_K, num_bits=6, group_size=16, scale_dtype="int8")
_IQ4_NL = replace(_GGUF, num_bits=4, type="nonlinear", scale_rule="signed", observer="mse")
_NVFP4_UE4M3 = replace(_NVFP4, scale_dtype="ue4m3", observer="mse")
_TQ2_0 = replace(_GGUF, num_bits=2, type="ternary", group_size=256, observer="absmean")
_TQ1_0 = replace(_TQ2_0, num_bits=1)


LLAMA_CPP_32 = QuantSpec(num_bits=8, strategy="group", group_size=32, scale_dtype="float16_late")
"""How llama.cpp quantizes the inputs of a layer on CPUs (q8_0): for weights in blocks of at most 64."""
LLAMA_CPP_256 = QuantSpec(num_bits=8, strategy="group", group_size=256)
"""The same for weights in blocks of 256 (q8_K)."""


def _mlx(bits: int) -> QuantSpec:
    """Groups of 64, mlx-lm's default. With 8 bits, rule minimum would leave the scale only 3 significant bits."""
    rule: ScaleRule = "minimum" if bits < 8 else "qmax"
    return QuantSpec(bits, False, "group", 64, scale_dtype="float16", scale_rule=rule)


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
    "NVFP4_UE4M3": Scheme(_NVFP4_UE4M3),
    "MXFP4": Scheme(_mx(4), _mx(4)),
    "MXFP4A16": Scheme(_mx(4)),
    "MXFP4XFP8": Scheme(_mx(4), _FP8_GROUP),
    "MXFP6A16": Scheme(_mx(6)),
    "MXFP6A8": Scheme(_mx(6), _mx(8)),
    "MXFP8": Scheme(_mx(8), _mx(8)),
    "MXFP8A16": Scheme(_mx(8)),
    **{f"MLX{bits}": Scheme(_mlx(bits)) for bits in (2, 3, 4, 5, 6, 8)},
    "F16": Scheme(_F16),
    "Q4_0": Scheme(_Q4_0),
    "Q4_1": Scheme(_Q4_1),
    "Q5_0": Scheme(_Q5_0),
    "Q5_1": Scheme(_Q5_1),
    "Q8_0": Scheme(_Q8_0),
    "IQ4_NL": Scheme(_IQ4_NL),
    "Q2_K": Scheme(_Q2_K),
    "Q3_K": Scheme(_Q3_K),
    "Q4_K": Scheme(_Q4_K),
    "Q5_K": Scheme(_Q5_K),
    "Q6_K": Scheme(_Q6_K),
    "TQ1_0": Scheme(_TQ1_0),
    "TQ2_0": Scheme(_TQ2_0),
}
_IN_BLOCKS_OF_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4A16", "NVFP4_UE4M3")
_IN_BLOCKS_OF_256 = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0")
SCHEMES |= {f"{name.removesuffix('A16')}_A8": Scheme(SCHEMES[name].weight, LLAMA_CPP_32) for name in _IN_BLOCKS_OF_32}
SCHEMES |= {f"{name}_A8": Scheme(SCHEMES[name].weight, LLAMA_CPP_256) for name in _IN_BLOCKS_OF_256}


def scheme(name: str, observer: str | None = None) -> Scheme:
    """Return the scheme with a name from compressed-tensors (`W4A16`) or GGUF (`Q4_0`), or for MLX (`MLX4`).

    The GGUF schemes match the formats exactly: blocks of 32 weights (256 in TQ2_0), float16 scales and GGUF's scale
    rule; in the K-quants (Q4_K), super-blocks of 256 weights with integer scales. NVFP4_UE4M3 is the NVFP4 of GGUF and
    MLX, whose e4m3 scales are not combined with a scale per tensor. F16 has no scales: it rounds weights to float16.
    ``_A8`` after a GGUF name adds the quantization of
    inputs that llama.cpp computes with on CPUs: ``Q4_0_A8``, ``Q4_K_A8``. Exporting a model trained with such a
    scheme is therefore lossless. So is exporting an MLX scheme to MLX.

    Args:
        name: Name of the scheme, case-insensitive.
        observer: Observer of the weight's scale, such as "lsq". The default is "minmax", because scheme names do not
            specify an observer; for TQ1_0 and TQ2_0, it is "absmean", and for IQ4_NL, NVFP4_UE4M3
            and K-quants "mse".

    Raises:
        QatkitError: The name is unknown, or the observer is not supported.

    Example:
        >>> scheme("W4A16").weight.group_size
        128
    """
    if name.upper() not in SCHEMES:
        raise QatkitError(f"unknown scheme '{name}'", key="scheme", advice=did_you_mean(name, SCHEMES))
    known = SCHEMES[name.upper()]
    if observer is None or known.weight is None:
        return known
    return replace(known, weight=replace(known.weight, observer=observer))
