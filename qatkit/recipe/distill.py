"""The ``distill`` block of a stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DistillConfig:
    """Learn from a teacher's outputs: ``alpha * T**2 * KL(teacher || student) + (1 - alpha) * loss``."""

    temperature: float = 1.0
    """Divides both sets of logits; above 0."""
    alpha: float = 0.5
    """Weight of the distillation term, 0 to 1; the labels' loss gets the rest."""
    loss: Literal["kl", "reverse_kl", "jsd", "mse"] = "kl"
    """KL(teacher || student), KL(student || teacher), Jensen-Shannon, or the squared error of the outputs."""
    beta: float = 0.5
    """With ``loss: jsd``, the teacher's share in the mixture, between 0 and 1."""
    ramp: float = 0.0
    """Share of the stage over which the distillation term rises to its weight, 0 to 1."""
    teacher: str | None = None
    """The stage whose result teaches; by default the input of the recipe's first compressing stage."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature} is out of range; write a number above 0")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: {self.alpha} is out of range; write a number from 0 to 1")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta: {self.beta} is out of range; write a number between 0 and 1")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp: {self.ramp} is out of range; write a number from 0 to 1")
