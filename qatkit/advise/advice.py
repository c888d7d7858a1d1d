"""Choose compression plans for a model and a device.

The decisions, in order: the runtime; the formats that it computes on this device; whether each fits into memory; the
cheapest method whose measured loss in the benchmarks is small enough. If few formats fit, a smaller model is a plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qatkit.advise.devices import Device
from qatkit.advise.options import Evidence, Option, default_runtime, evidence_for, options_of, processor_of
from qatkit.advise.phases import Phases, is_language_model
from qatkit.advise.roofline import LayerCost, Technique, seconds
from qatkit.advise.serving import cached_numbers, weight_bytes
from qatkit.errors import QatkitError

TRAINING_BYTES = 16
"""Bytes per parameter of a full training step without activations: fp32 weights, gradients and two AdamW moments."""
SMALLER = 0.5
"""Fraction of layers, neurons or channels that remain in a smaller model."""


@dataclass(frozen=True)
class Situation:
    """Everything that a plan depends on."""

    model: nn.Module
    """The model with plain layers, on the meta device."""
    phases: Phases
    """The costs of its layers in the calls that a server makes."""
    device: Device
    memory: float
    """GB (1e9 bytes) available for weights and KV cache."""
    context: int
    batch: int
    max_loss: float
    """Percent: relative perplexity of a language model, accuracy points of other models."""
    training: bool
    runtime: str | None = None

    @property
    def language(self) -> bool:
        """Whether the model generates text."""
        return is_language_model(self.model)

    @property
    def family(self) -> str:
        """The family of models whose benchmark results are nearest."""
        if self.language:
            return "language"
        kinds = {layer.kind for phase in self.phases.values() for layer in phase}
        return "convolutional" if any("Conv" in kind for kind in kinds) else "mlp"

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


@dataclass(frozen=True)
class Plan:
    """A candidate, with its predictions and the evidence for its accuracy."""

    option: Option
    method: str
    """"PTQ", "PTQ, GPTQ" or "QAT + KD"."""
    smaller: bool
    """Whether layers, neurons or channels are removed first."""
    memory: float
    """Bytes of weights and KV cache."""
    seconds: float
    """Least time of one decoded token, or of one call of a model that generates no text."""
    evidence: tuple[Evidence, ...]
    loss: float | None
    """Percent, the sum over the evidence; None if there is none."""
    fits: bool
    meets: bool
    """Whether the loss is within the limit."""
    training_memory: float
    """Bytes of a training step without activations; 0 without training."""

    @property
    def name(self) -> str:
        """The plan in words."""
        return f"{'smaller model, ' if self.smaller else ''}{self.option.name}, {self.method}"


def plans_for(situation: Situation) -> list[Plan]:
    """Return up to four plans, the best first: one per format, a smaller model, or the other method.

    Plans that fit into memory and keep the loss come first; among them, those without training, and then the fastest.
    Among plans that lose more, the one with the smallest loss comes first.

    Args:
        situation: The situation.

    Raises:
        QatkitError: the runtime computes no compressed format of this kind of model on this device.
    """
    runtime = situation.runtime or default_runtime(situation.language, processor_of(situation.device))
    options = options_of(runtime, situation.language, situation.device)
    if not options:
        kind = "language models" if situation.language else "models that generate no text"
        raise QatkitError(
            f"'{runtime}' computes no compressed format of {kind} on '{situation.device.name}'",
            key="--runtime",
            advice="use another runtime or another device",
        )
    plans = [_plan(situation, option, smaller=False) for option in options]
    fitting = [plan for plan in plans if plan.fits]
    if situation.training and len(options) == 1 and fitting:
        plans.append(_plan(situation, options[0], smaller=False, other=True))
    if situation.training and len(fitting) < 2:
        plans += [_plan(situation, option, smaller=True) for option in options]
    return sorted(plans, key=_order)[:4]


def _order(plan: Plan) -> tuple[object, ...]:
    loss = 0.0 if plan.meets else float("inf") if plan.loss is None else plan.loss
    return not plan.fits, loss, plan.smaller, plan.method == "QAT + KD", plan.seconds


def _plan(situation: Situation, option: Option, smaller: bool, other: bool = False) -> Plan:
    ptq = ["PTQ, GPTQ", "PTQ"] if option.gptq else ["PTQ"]
    free = evidence_for(situation.family, option.evidence, ptq)
    trained = evidence_for(situation.family, option.evidence, ["QAT + KD"])
    enough = free is not None and free.loss <= situation.max_loss
    train = situation.training and (smaller or enough == other)
    found = [row for row in (trained if train else free,) if row is not None]
    if smaller and (row := evidence_for(situation.family, "smaller model", ["KD"])) is not None:
        found.append(row)
    loss = sum(row.loss for row in found) if len(found) == 1 + smaller else None
    kept = SMALLER if smaller else 1.0
    memory = kept * (_weights(situation, option) + situation.cache)
    return Plan(
        option=option,
        method="QAT + KD" if train else ptq[0],
        smaller=smaller,
        memory=memory,
        seconds=kept * _least_time(situation, option.technique),
        evidence=tuple(found),
        loss=loss,
        fits=memory <= situation.memory * 1e9,
        meets=loss is not None and loss <= situation.max_loss,
        training_memory=TRAINING_BYTES * situation.parameters if train else 0.0,
    )


def dense_memory(situation: Situation) -> float:
    """Return the bytes of weights and KV cache without compression."""
    if situation.language:
        return weight_bytes(situation.model, "BF16") + situation.cache
    return 4.0 * situation.parameters


def _weights(situation: Situation, option: Option) -> float:
    if situation.language:
        return weight_bytes(situation.model, option.name)
    layers = _served(situation.phases)
    quantized = sum(layer.weights for layer in layers if layer.flops and not layer.between_activations)
    return quantized + 4.0 * (situation.parameters - quantized)


def _least_time(situation: Situation, technique: Technique) -> float:
    if technique.dtype is not None and technique.dtype not in situation.device.rates:  # computed in the base dtype
        technique = Technique(technique.name, technique.weight_bits)
    layers = _served(situation.phases)
    return sum(seconds(layer, situation.device, situation.dtype, technique) for layer in layers)


def dense_time(situation: Situation) -> float:
    """Return the least time of one decoded token or one call without compression."""
    return _least_time(situation, Technique("none", weight_bits=16 if situation.language else None))


def _served(phases: Phases) -> Sequence[LayerCost]:
    return phases["decode"] if "decode" in phases else phases["forward"]


def stages_of(plan: Plan, head: str | None, layers: int | None) -> Mapping[str, Any]:
    """Return the stages that carry out a plan, after a dense stage.

    Args:
        plan: The plan.
        head: The name of the output layer of a language model, which is not quantized.
        layers: The number of layers of a language model; None for other models.
    """
    distill = {"temperature": 1.0 if head else 4.0, "alpha": 0.7}
    lr = 1e-4 if head else 1e-3
    stages: dict[str, Any] = {}
    if plan.smaller:
        kept = {"layers": max(1, round(layers * SMALLER)), "neurons": 0.75} if layers else {"channels": SMALLER}
        stages["smaller"] = {"max_steps": 1000, "lr": lr, "warmup": 0.05, "shrink": kept, "distill": distill}
    quantize = dict(plan.option.quantize)
    if head:
        quantize["exclude"] = [head]
    if plan.method == "QAT + KD":
        if "scheme" in quantize:
            quantize["observer"] = "lsq"
        stages["qat"] = {"max_steps": 500, "lr": lr, "warmup": 0.05, "distill": distill, "quantize": quantize}
    else:
        if plan.option.gptq:
            quantize |= {"init": "gptq", "observer": "mse"}
        stages["ptq"] = {"max_steps": 0, "quantize": quantize}
    return stages
