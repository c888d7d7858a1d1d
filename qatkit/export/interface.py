"""The types of the arguments and return values of an export format's functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qatkit.errors import QatkitError
from qatkit.quantization.placement.points import placement_of
from qatkit.quantization.prepare import fake_quantizers, schemes_of
from qatkit.quantization.targets import Target
from qatkit.schemes import Scheme
from qatkit.tasks.table import Task


@dataclass(frozen=True)
class PlannedExport:
    """The quantization of the model to export, as planned before training."""

    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    """Schemes by layer name, without unquantized layers."""
    kv_cache: bool = False
    """Whether the KV cache is quantized."""
    task: Task | None = None
    """The task declared by the data; None if it is unknown."""
    linear_codes: bool = False
    """Whether the outputs of linear layers are quantized too, for targets with `Target.linear_codes`."""

    @classmethod
    def of(cls, model: nn.Module, task: Task | None = None) -> PlannedExport:
        """Return the quantization of a model prepared by `prepare_qat`; empty for a plain model."""
        kv_cache = any(name.rpartition(".")[2] == "key_fake_quant" for name, _ in fake_quantizers(model))
        return cls(schemes_of(model), kv_cache, task, bool(placement_of(model).points))


@dataclass(frozen=True)
class ReadBack:
    """An exported file whose weights have been compared to the model's."""

    weights: int
    """Number of quantized weights that were compared."""
    failures: list[str]
    """Descriptions of all differences."""
    runtime: Callable[..., Any] | None
    """The file loaded in its runtime, with the model's call signature; None if it cannot be loaded."""
    after: Callable[[], list[str]] | None = None
    """Returns the problems found while the runtime ran; called after the last batch."""
    name: str = ""
    """The program that runs the file, if it is not always that of the format's row."""
    not_run: str = ""
    """The format's runtime, if `runtime` is another program, because no environment with the format's was passed."""
    close: Callable[[], None] | None = None
    """Frees what `runtime` holds; always called at the end."""


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer."""

    layer: str
    """The layer's name in the model."""
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    output: Any


@dataclass(frozen=True)
class Walk:
    """A model and its exported file, whose layers are compared one by one."""

    model: nn.Module
    """The model that computes what the file should compute."""
    runtime: Callable[..., Any]
    """The file loaded in its runtime, with the model's call signature. Each call fills `calls`."""
    layers: tuple[str, ...]
    """Names of the layers whose calls are recorded."""
    calls: list[LayerCall]
    """The calls of the last batch, in the order of the runtime."""
    skipped: Mapping[str, str]
    """Layers whose outputs cannot be read, with the reason."""


class InputError(QatkitError):
    """A batch that a runtime does not accept. The data must change, and nothing is known about the file."""


@dataclass(frozen=True)
class ExportContext:
    """Information that a format may need in addition to the model."""

    batch: Any
    """One test batch, for formats that trace."""
    task: Task | None = None
    """The task declared by the data; None if it is unknown."""
    target: Target | None = None
    """The runtime and processor that the model was trained for; None if the recipe sets no target."""
    tokenizer: Any = None
    """The tokenizer of the data; None if there is none."""


@dataclass(frozen=True)
class Measured:
    """The measurements of one output on which its error bound may depend."""

    quantizes_inputs: bool
    half_precision: bool
    """Whether a parameter is float16 or bfloat16."""
    quantization_error: float
    """Mean of ``|trained - the same weights without fake quantization|``."""
    mean_output: float
    """Mean of ``|trained|``; 1 if the output is `whole`."""
    whole: bool = False
    """Whether the values are integers or booleans; each differs by 1 or not at all."""
    rounding_error: float = 0.0
    """Mean of ``|trained - the same in float64 with random rounding errors|``, if the format's row requests it. It
    measures how far rounding differences, which change single codes, affect the outputs.
    """


@dataclass(frozen=True)
class Bound:
    """The mean output error that verification allows."""

    text: str
    """Description of the bound."""
    limit: float | None
    """The bound as a number; None if outputs are not bounded."""


EXACT = Bound("exactly equal outputs", 0.0)
