"""What watches a stage while it trains: the ``early_stopping`` and the ``samples`` block."""

from __future__ import annotations

from dataclasses import dataclass, field

from qatkit.recipe.common import MISSING


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """End the stage when the validation loss no longer falls; its result is the model of the best validation."""

    patience: int = 3
    """Validations in a row, one at every epoch's end, without an improvement."""
    min_delta: float = 0.0
    """How much lower the loss has to be to count as one, in nats."""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience: {self.patience} is out of range; write a whole number of at least 1")
        if self.min_delta < 0:
            raise ValueError(f"min_delta: {self.min_delta} is out of range; write 0 or more")


@dataclass(frozen=True)
class SamplesConfig:
    """Let a language model continue prompts now and then, to be read beside its curves; training goes on as without."""

    every: int = MISSING
    """Optimizer steps between two times."""
    prompts: list[str] = field(default_factory=list)
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("every", "max_new_tokens"):
            if (value := getattr(self, name)) != MISSING and value < 1:
                raise ValueError(f"{name}: {value} is out of range; write a whole number of at least 1")
        if not self.prompts:
            raise ValueError('prompts: there is none; write the beginnings of texts, such as ["def main"]')
        for index, prompt in enumerate(self.prompts):
            if not prompt:
                raise ValueError(f"prompts[{index}]: '' is empty; write the beginning of a text")
