"""Choose compression plans for a model and a device.

The decisions, in order: the runtime; the formats that it computes on this device; whether each fits into memory; the
cheapest method whose measured loss in the benchmarks is small enough. If few formats fit, a smaller model is a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qatkit.advise.devices import DEVICES
from qatkit.advise.families import NAMES
from qatkit.advise.options import RUNTIMES, Evidence, Option, default_runtime, evidence_for, options_of
from qatkit.advise.situation import Situation
from qatkit.common.units import format_bytes
from qatkit.errors import QatkitError

TRAINING_BYTES = 16
"""Bytes per parameter of a full training step without activations: fp32 weights, gradients and two AdamW moments."""

OTHER_PTQ = ("PTQ", "quantize_static of ONNX Runtime", "quantize_dynamic of ONNX Runtime")
"""Methods without training whose results are evidence for a plan without training, if its own method has none."""


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


@dataclass(frozen=True)
class Advice:
    """Plans, and what a user must know about them."""

    plans: list[Plan]
    """The best plan first."""
    notes: list[str]
    """What the plans do not achieve, and what is unknown about them."""


def advice_for(situation: Situation) -> Advice:
    """Return up to four plans, the best first: one per format, a smaller model, or the other method.

    Plans that fit into memory and keep the loss come first; among them, those without training, and then the fastest.
    Among plans that lose more, the one with the smallest loss comes first.

    Args:
        situation: The situation.

    Raises:
        QatkitError: the runtime computes no compressed format of this family of models on this device.
    """
    runtime = situation.runtime or default_runtime(situation.family, situation.device)
    options = options_of(runtime, situation.family, situation.device)
    if not options:
        raise _no_option(situation, runtime)
    plans = [_plan(situation, option) for option in options]
    fitting = [plan for plan in plans if plan.fits]
    notes = []
    if situation.training and len(options) == 1 and fitting:
        plans.append(_plan(situation, options[0], other=True))
    if situation.training and len(fitting) < 2:
        try:
            smaller = situation.smaller()
        except QatkitError as error:
            notes.append(f"no plan has a smaller model: {error}")
        else:
            plans += [_plan(smaller, option, smaller=True) for option in options]
    plans = sorted(plans, key=_order)[:4]
    return Advice(plans, [*notes, *_missed(situation, plans)])


def _no_option(situation: Situation, runtime: str) -> QatkitError:
    """The error if a runtime has no format for a model, which lists the runtimes or the devices that have one."""
    family, device = situation.family, situation.device
    runtimes = [name for name in RUNTIMES if options_of(name, family, device)]
    devices = [each.name for each in DEVICES.values() if any(options_of(name, family, each) for name in RUNTIMES)]
    if runtimes:
        key, advice = "--runtime", f"use --runtime {' or '.join(runtimes)}"
    else:
        key, advice = "--device", f"for {NAMES[family]}, use one of: {', '.join(devices)}"
    return QatkitError(
        f"'{runtime}' computes no compressed format of {NAMES[family]} on '{device.name}'", key=key, advice=advice
    )


def _missed(situation: Situation, plans: Sequence[Plan]) -> list[str]:
    """What no plan achieves."""
    notes, fitting = [], [plan for plan in plans if plan.fits]
    known = [plan.loss for plan in fitting if plan.loss is not None]
    if not fitting:
        least = format_bytes(round(min(plan.memory for plan in plans)))
        lever = "a shorter --context, a smaller --batch, " if situation.language else ""
        notes.append(
            f"no plan fits into {situation.memory:g} GB, because the smallest one needs {least}; use {lever}a device "
            "with more memory or a smaller model"
        )
    if all(plan.loss is None for plan in plans):
        seen = type(situation.model).__name__
        what = f"{seen}, whose family is unknown" if situation.family == "unknown" else NAMES[situation.family]
        notes.append(f"no plan has an expected loss, because the benchmarks do not include {what}")
    elif known and min(known) > situation.max_loss:
        notes.append(
            f"no plan that fits is within --max-loss {situation.max_loss:g}: the smallest expected loss is "
            f"{min(known):.2f}%"
        )
    return notes


def _order(plan: Plan) -> tuple[object, ...]:
    loss = 0.0 if plan.meets else float("inf") if plan.loss is None else plan.loss
    return not plan.fits, loss, plan.smaller, plan.method == "QAT + KD", plan.seconds


def _plan(situation: Situation, option: Option, smaller: bool = False, other: bool = False) -> Plan:
    method = "PTQ, GPTQ" if option.gptq else "PTQ"
    free = evidence_for(situation.family, option.evidence, [method, *OTHER_PTQ])
    trained = evidence_for(situation.family, option.evidence, ["QAT + KD"])
    enough = free is not None and free.loss <= situation.max_loss
    train = situation.training and (smaller or enough == other)
    found = [row for row in (trained if train else free,) if row is not None]
    if smaller and (row := evidence_for(situation.family, "smaller model", ["KD"])) is not None:
        found.append(row)
    loss = sum(row.loss for row in found) if len(found) == 1 + smaller else None
    memory = situation.memory_of(option)
    return Plan(
        option=option,
        method="QAT + KD" if train else method,
        smaller=smaller,
        memory=memory,
        seconds=situation.time_of(option.technique),
        evidence=tuple(found),
        loss=loss,
        fits=memory <= situation.memory * 1e9,
        meets=loss is not None and loss <= situation.max_loss,
        training_memory=TRAINING_BYTES * situation.parameters if train else 0.0,
    )
