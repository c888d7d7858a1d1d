"""A situation: a model on a device, with the memory and the time that formats take there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from qatkit.advise.devices import Device
from qatkit.advise.families import Family, family_of
from qatkit.advise.options import Option
from qatkit.advise.phases import Phases, forward_phases, language_phases, served_layers
from qatkit.advise.roofline import Technique, seconds
from qatkit.advise.serving import cached_numbers, weight_bytes
from qatkit.advise.smaller import smaller_model
from qatkit.tasks import call


@dataclass(frozen=True)
class Situation:
    """Everything that a plan depends on."""

    model: nn.Module
    """The model with plain layers, on the meta device."""
    phases: Phases
    """The costs of its layers in the calls that a server makes."""
    inputs: Any
    """A batch on the meta device, of the size of a call; None for a language model."""
    device: Device
    memory: float
    """GB (1e9 bytes) available for weights and KV cache."""
    context: int
    """Tokens per sequence of a language model."""
    batch: int
    max_loss: float
    """Percent: relative perplexity of a language model, accuracy points of other models."""
    training: bool
    runtime: str | None = None

    @cached_property
    def family(self) -> Family:
        """The family of the model."""
        return family_of(self.model, self.phases)

    @property
    def language(self) -> bool:
        """Whether the model generates text."""
        return self.family == "language"

    @property
    def dtype(self) -> str:
        """The dtype without compression."""
        return "bf16" if self.language and "bf16" in self.device.rates else "fp32"

    @property
    def cache(self) -> int:
        """Bytes of the KV cache."""
        return cached_numbers(self.model) * self.context * self.batch * 2 if self.language else 0

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def smaller(self) -> Situation:
        """Return the situation with the smaller model of a plan.

        Raises:
            QatkitError: the model cannot be shrunk.
        """
        model = smaller_model(self.model, self.family, self.inputs).eval()
        return replace(self, model=model, phases=phases_of(model, self.inputs, self.batch, self.context))

    def dense_memory(self) -> float:
        """Return the bytes of weights and KV cache without compression."""
        return weight_bytes(self.model, "BF16") + self.cache if self.language else 4.0 * self.parameters

    def memory_of(self, option: Option) -> float:
        """Return the bytes of weights and KV cache in a format."""
        if self.language:
            return weight_bytes(self.model, option.name) + self.cache
        layers = served_layers(self.phases)
        quantized = sum(layer.weights for layer in layers if layer.flops and not layer.between_activations)
        return quantized + 4.0 * (self.parameters - quantized)

    def dense_time(self) -> float:
        """Return the least time of one decoded token or one call without compression, in seconds."""
        return self.time_of(Technique("none", weight_bits=16 if self.language else None))

    def time_of(self, technique: Technique) -> float:
        """Return the least time of one decoded token or one call, in seconds."""
        if technique.dtype is not None and technique.dtype not in self.device.rates:  # computed in the base dtype
            technique = Technique(technique.name, technique.weight_bits)
        return sum(seconds(layer, self.device, self.dtype, technique) for layer in served_layers(self.phases))


def phases_of(model: nn.Module, inputs: Any, batch: int, context: int) -> Phases:
    """Return the costs of a model in the calls that a server makes.

    Args:
        model: The model on the meta device.
        inputs: A batch on the meta device; None for a language model.
        batch: Number of sequences of a language model.
        context: Tokens per sequence of a language model.
    """
    if inputs is None:
        return language_phases(model, batch, context)
    return forward_phases(model, lambda: call(model, inputs))
