"""The values that the functions of an export format take and return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.prepare import fake_quantizers, qat_weights
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec
from qatkit.tasks.table import Task


@dataclass(frozen=True)
class PlannedExport:
    """The quantization of the model that will be exported; known before training."""

    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    """By layer name; layers that are not quantized are absent."""
    kv_cache: bool = False
    """Whether keys and values are quantized."""
    task: Task | None = None
    """The task declared by the data; None if it is unknown."""

    @classmethod
    def of(cls, model: nn.Module) -> PlannedExport:
        """The quantization of a model from `prepare_qat`; empty for a plain one."""
        schemes = {
            weight.name.removesuffix(f".{weight.part}"): Scheme(
                _spec(weight.weight_fake_quant), _spec(weight.input_fake_quant)
            )
            for weight in qat_weights(model)
        }
        return cls(schemes, any(name.rpartition(".")[2] == "key_fake_quant" for name, _ in fake_quantizers(model)))


def _spec(fake_quant: FakeQuantize | None) -> QuantSpec | None:
    return None if fake_quant is None else fake_quant.spec


@dataclass(frozen=True)
class ReadBack:
    """An exported file whose weights have been compared with the model's."""

    weights: int
    """Quantized weights that were compared."""
    failures: list[str]
    """Every difference, as text."""
    runtime: Callable[..., Any] | None
    """The file in its runtime, called as the model is; None if it cannot be loaded."""
    after: Callable[[], list[str]] | None = None
    """What the calls of the runtime have shown to be wrong, asked for after the last one."""


@dataclass(frozen=True)
class Measured:
    """The measurements that an error bound may depend on."""

    quantizes_inputs: bool
    half_precision: bool
    """Whether a parameter is float16 or bfloat16."""
    quantization_error: float
    """Mean of ``|trained - the same weights without fake quantization|`` over all outputs."""
    mean_output: float
    """Mean of ``|trained|`` over all outputs."""
    rounding_error: float = 0.0
    """Mean of ``|trained - the same computed in float64|``, if the format's row asks for it: rounding moves values
    across rounding borders."""


@dataclass(frozen=True)
class Bound:
    """The mean output error that verification allows."""

    text: str
    """The bound as text."""
    limit: float | None
    """The bound as a number; None if outputs are not bounded."""


EXACT = Bound("exactly equal outputs", 0.0)
