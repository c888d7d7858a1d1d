"""Blocks that observe a stage while it trains: ``early_stopping`` and ``samples``."""

from __future__ import annotations

from dataclasses import dataclass, field

from qatkit.errors import QatkitError
from qatkit.recipe.common import MISSING


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """Stop when the validation loss no longer improves; the stage's result is the model with the lowest one."""

    patience: int = 3
    """Consecutive validations without an improvement; there is one at the end of every epoch."""
    min_delta: float = 0.0
    """Minimum decrease of the loss that counts as an improvement, in nats."""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise QatkitError(f"{self.patience} is out of range", key="patience", advice="use an integer of at least 1")
        if self.min_delta < 0:
            raise QatkitError(f"{self.min_delta} is out of range", key="min_delta", advice="use 0 or a number above 0")


@dataclass(frozen=True)
class SamplesConfig:
    """Generate text from fixed prompts at regular intervals; training itself is unaffected."""

    every: int = MISSING
    """Optimizer steps between generations."""
    prompts: list[str] = field(default_factory=list)
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        for key in ("every", "max_new_tokens"):
            if (value := getattr(self, key)) != MISSING and value < 1:
                raise QatkitError(f"{value} is out of range", key=key, advice="use an integer of at least 1")
        if not self.prompts:
            raise QatkitError(
                "there are none", key="prompts", advice='list the beginnings of texts, such as ["def main"]'
            )
        for index, prompt in enumerate(self.prompts):
            if not prompt:
                raise QatkitError("'' is empty", key=f"prompts[{index}]", advice="give the beginning of a text")
