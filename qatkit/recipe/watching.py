"""Blocks that observe a stage while it trains: ``early_stopping`` and ``samples``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from qatkit.common.ranges import FLOAT32, Count, Range, check_ranges
from qatkit.errors import QatkitError
from qatkit.recipe.common import MISSING


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """Stop when the validation loss no longer improves; the stage's result is the model with the lowest loss."""

    patience: Count = 3
    """Number of consecutive validations without an improvement; each epoch ends with a validation."""
    min_delta: Annotated[float, Range(0.0, FLOAT32)] = 0.0
    """Minimum decrease of the loss that counts as an improvement, in nats."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class SamplesConfig:
    """Generate text from fixed prompts at regular intervals, without affecting training."""

    every: Count = MISSING
    """Number of optimizer steps between generations."""
    prompts: list[str] = field(default_factory=list)
    max_new_tokens: Count = 32

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.prompts:
            raise QatkitError(
                "the list is empty", key="prompts", advice='list the prompts to continue, such as ["def main"]'
            )
        for index, prompt in enumerate(self.prompts):
            if not prompt:
                raise QatkitError(
                    "the prompt is empty", key=f"prompts[{index}]", advice="use text for the model to continue"
                )
