"""The ``quantize`` block of a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qatkit.common.ranges import Count, check_ranges
from qatkit.errors import QatkitError
from qatkit.quantization.observers import OBSERVERS
from qatkit.quantization.ptq.methods import METHODS
from qatkit.quantization.targets import TARGETS, check_placed
from qatkit.schemes import Scheme, check_kv_cache, scheme
from qatkit.spec import QuantSpec


@dataclass(frozen=True)
class LayerConfig:
    """Quantization of the layers that a glob selects, as a scheme name or as specs."""

    scheme: str | None = None
    """Name of a scheme of compressed-tensors (W4A16, FP8_DYNAMIC, NVFP4, ...) or GGUF (Q4_0, ...), instead of specs."""
    observer: str | None = None
    """Observer of the weight's scale if `scheme` is set, such as lsq. The default is minmax, or mse with K-quants."""
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    """Quantization of each layer's input. With ``strategy: tensor``, scales are calibrated and frozen unless
    ``dynamic`` is set; with ``token`` and ``group``, they are dynamic.
    """

    def __post_init__(self) -> None:
        _ = self.specs

    @property
    def specs(self) -> Scheme:
        """The weight and activation specs, either as configured or from the scheme."""
        if self.scheme is None:
            if self.observer is not None:
                raise QatkitError(
                    f"'{self.observer}' has no effect without scheme", key="observer",
                    advice="set observer in the weight block: {observer: ...}",
                )  # fmt: skip
            return Scheme(self.weight, self.activation)
        if self.weight is not None or self.activation is not None:
            raise QatkitError(
                f"'{self.scheme}' already defines weight and activation", key="scheme",
                advice="set either scheme, or weight and activation",
            )  # fmt: skip
        return scheme(self.scheme, self.observer)


@dataclass(frozen=True)
class QuantizeConfig(LayerConfig):
    """Fake-quantize the layers that the globs select."""

    target: str | None = None
    """Runtime that will run the model, such as onnxruntime. It provides the defaults of weight and activation, and
    tensors that its integer kernels read or write are also quantized.
    """
    layers: dict[str, LayerConfig] = field(default_factory=dict)
    """Quantization by glob over layer names, which overrides weight and activation; the last matching glob wins."""
    kv_cache: QuantSpec | None = None
    """Quantization of the KV cache, with ``strategy: tensor`` or ``token``."""
    init: str | None = None
    """PTQ method that sets the starting point: rtn, mse, importance, gptq, awq or smoothquant. By default, stored
    scales start where the squared error is smallest.
    """
    share_inputs: bool = False
    """Share one static scale among layers that read the same input (q/k/v, gate/up) instead of one scale per layer."""
    include: list[str] = field(default_factory=lambda: ["*"])
    """Globs over layer names; each must match a layer."""
    exclude: list[str] = field(default_factory=list)
    """Globs over names of layers to leave unquantized; each must match a layer."""
    calibration_batches: Count = 16
    """Number of training batches for the calibration of static ranges, at least 1."""

    def __post_init__(self) -> None:
        if self.target is not None:
            row = TARGETS.row(self.target, "target")
            if self.scheme is None:
                for name in ("weight", "activation"):
                    if getattr(self, name) is None:
                        object.__setattr__(self, name, getattr(row, name))
            if self.specs.activation is not None:
                check_placed(self.specs.activation, self.target)
        if self.specs == Scheme() and not self.layers and self.kv_cache is None:
            raise QatkitError("neither weight nor activation is set", key="weight", advice="set weight: {num_bits: 8}")
        if self.kv_cache is not None:
            check_kv_cache(self.kv_cache)
        if self.init is not None:
            self._check_init(self.init)
        if not self.include:
            raise QatkitError("[] selects no layer", key="include", advice="use ['*'], or remove the quantize block")
        check_ranges(self)

    def _check_init(self, init: str) -> None:
        sets_scales = METHODS.row(init, "init").stored_scales
        overrides = {f"layers.{glob}": layer.specs for glob, layer in self.layers.items()}
        for where, specs in {"weight": self.specs, **overrides}.items():
            if specs.weight is None or not specs.weight.element.scaled:
                continue
            observer = specs.weight.observer
            if sets_scales and OBSERVERS[observer].computed:
                raise QatkitError(
                    f"'{init}' sets weight scales, but {where} uses observer '{observer}', which computes them from "
                    "the weights on every step",
                    key="init",
                    advice="use observer: mse (a stored scale) or observer: lsq (a learned scale) for this weight",
                )

    @property
    def moves_weights(self) -> bool:
        """Whether the starting point changes the weights of the previous stage's model."""
        return self.init is not None and METHODS[self.init].changes_weights

    @property
    def moves_zeros(self) -> bool:
        """Whether the starting point makes pruned weights nonzero."""
        return self.init is not None and not METHODS[self.init].keeps_zeros

    @property
    def drops_zeros(self) -> str:
        """The key whose weight quantization makes pruned weights nonzero, such as "weight"; empty if there is none."""
        schemes = {"weight": self.specs} | {f"layers.{glob}": layer.specs for glob, layer in self.layers.items()}
        found = (key for key, specs in schemes.items() if specs.weight is not None and not specs.weight.keeps_zeros)
        return next(found, "")

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `prepare_qat`."""
        return {
            "weight": self.specs.weight,
            "activation": self.specs.activation,
            "include": self.include,
            "exclude": self.exclude,
            "layers": {glob: layer.specs for glob, layer in self.layers.items()},
            "kv_cache": self.kv_cache,
            "share_inputs": self.share_inputs,
        }
