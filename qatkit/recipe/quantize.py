"""The ``quantize`` block of a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from qatkit.schemes import Scheme, check_kv_cache, scheme
from qatkit.spec import Observer, QuantSpec


@dataclass(frozen=True)
class LayerConfig:
    """How the layers that a glob selects are quantized: by the name of a scheme, or by specs."""

    scheme: str | None = None
    """A name of compressed-tensors (W4A16, FP8_DYNAMIC, NVFP4, ...) or GGUF (Q4_0, Q8_0), instead of specs."""
    observer: Observer | None = None
    """With a scheme: where the weight's scale comes from, such as lsq; by default the range."""
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    """Quantization of each layer's input: ``strategy: tensor`` is calibrated and frozen, ``token`` and ``group`` are
    dynamic."""

    def __post_init__(self) -> None:
        _ = self.how

    @property
    def how(self) -> Scheme:
        """The specs, wherever they come from."""
        if self.scheme is None:
            if self.observer is not None:
                raise ValueError("observer: it goes with scheme; write it inside weight: {observer: ...}")
            return Scheme(self.weight, self.activation)
        if self.weight is not None or self.activation is not None:
            raise ValueError(
                f"scheme: '{self.scheme}' says what weight and activation are; write scheme, or these, not both"
            )
        return scheme(self.scheme, self.observer)


@dataclass(frozen=True)
class QuantizeConfig(LayerConfig):
    """Fake-quantize the layers that the patterns select."""

    layers: dict[str, LayerConfig] = field(default_factory=dict)
    """By glob over layer names, what is quantized otherwise; of several that match a layer the last decides."""
    kv_cache: QuantSpec | None = None
    """Quantization of the keys and values that attention caches: ``strategy: tensor`` or ``token``."""
    init: Literal["rtn", "mse", "gptq", "awq", "smoothquant"] | None = None
    """Where the weights and scales start from; by default scales that are kept start at the least squared error."""
    share_inputs: bool = False
    """Give layers that read the same input (q/k/v, gate/up) one static scale instead of one each."""
    include: list[str] = field(default_factory=lambda: ["*"])
    """Globs over layer names; every one must match a layer."""
    exclude: list[str] = field(default_factory=list)
    calibration_batches: int = 16
    """Training batches whose activations set the static ranges, at least 1."""

    def __post_init__(self) -> None:
        how = self.how
        if how == Scheme() and not self.layers and self.kv_cache is None:
            raise ValueError("weight: neither weight nor activation is given; write weight: {num_bits: 8}")
        if self.kv_cache is not None:
            check_kv_cache(self.kv_cache)
        for where, found in {
            "weight": how,
            **{f"layers.{glob}": layer.how for glob, layer in self.layers.items()},
        }.items():
            observer = found.weight.observer if found.weight is not None else None
            if self.init in ("mse", "gptq", "awq") and observer in ("minmax", "absmean"):
                raise ValueError(
                    f"init: '{self.init}' sets scales, but those of {where} are computed from the weights on every "
                    "step; write observer: mse there (the scale stays) or observer: lsq (it is learned)"
                )
        if not self.include:
            raise ValueError("include: [] selects no layer; write ['*'] or leave the quantize block out")
        if self.calibration_batches < 1:
            raise ValueError(
                f"calibration_batches: {self.calibration_batches} is out of range; write a number of at least 1"
            )

    @property
    def moves_weights(self) -> bool:
        """Whether the weights that training starts from are not those of the stage before."""
        return self.init in ("gptq", "awq", "smoothquant")

    @property
    def arguments(self) -> dict[str, Any]:
        """What `prepare_qat` is called with."""
        return {
            "weight": self.how.weight,
            "activation": self.how.activation,
            "include": self.include,
            "exclude": self.exclude,
            "layers": {glob: layer.how for glob, layer in self.layers.items()},
            "kv_cache": self.kv_cache,
            "share_inputs": self.share_inputs,
        }
