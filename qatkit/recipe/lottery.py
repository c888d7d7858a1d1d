"""The ``lottery``, ``rewind`` and ``part`` blocks of a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from qatkit.common.ranges import INT32, Count, Range, Seed, Steps, check_ranges
from qatkit.errors import QatkitError
from qatkit.recipe.common import MISSING


@dataclass(frozen=True)
class LotteryConfig:
    """Iterative magnitude pruning with rewinding: train, prune a fraction of the remaining weights, rewind, repeat.

    A stage ``ticket`` of `max_steps` steps with this block is expanded into the stages ``ticket_start`` (the steps up
    to the rewind point, if there are any), ``ticket_0`` (dense training), ``ticket_1`` to ``ticket_ROUNDS`` and, with
    `reinit`, ``ticket_reinit``. A later run with more rounds continues after the last finished round.
    """

    rounds: Annotated[int, Range(1, 1000)] = MISSING
    fraction: Annotated[float, Range(0.0, 1.0, above=True, below=True, example="0.2")] = 0.2
    """Fraction of the remaining weights that each round prunes; the sparsity after r rounds is ``1 - (1 - fraction) **
    r``.
    """
    rewind: int | str = "init"
    """Rewind point of the kept weights. ``init`` restores the weights before the stage (Frankle & Carbin, 2019); a
    number of steps restores the weights after that many steps (Frankle et al., 2020); ``learning_rate`` keeps the
    weights and restarts only the learning-rate schedule (Renda et al., 2020).
    """
    reinit: bool = False
    """Also train with the mask of the last round from a new random initialization, as the control for the winning
    ticket.
    """
    scope: Literal["layer", "model"] = "layer"
    """Prune every layer to the same sparsity, or rank the weights of all layers together."""
    include: list[str] = field(default_factory=lambda: ["*"])
    """Globs over layer names; each must match a layer."""
    exclude: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_ranges(self)
        if isinstance(self.rewind, str) and self.rewind not in ("init", "learning_rate"):
            raise QatkitError(
                f"'{self.rewind}' is unknown", key="rewind", advice="use init, learning_rate or a number of steps"
            )
        if isinstance(self.rewind, int) and not 1 <= self.rewind <= INT32:
            raise QatkitError(
                f"{self.rewind} is out of range",
                key="rewind",
                advice=f"use init, or a number of steps from 1 to {INT32}",
            )


@dataclass(frozen=True)
class RewindConfig:
    """Start from earlier weights under the stage's current sparsity mask."""

    stage: str | None = None
    """The stage whose final weights are restored; null is the recipe's model before its first stage."""
    seed: Seed | None = None
    """Seed for newly initialized weights to use instead of earlier weights."""

    def __post_init__(self) -> None:
        if self.stage is not None and self.seed is not None:
            raise QatkitError(
                f"{self.seed} and stage={self.stage} are both set", key="seed", advice="remove either seed or stage"
            )
        check_ranges(self)


@dataclass(frozen=True)
class PartConfig:
    """Make the stage a part of a longer learning-rate schedule."""

    of: Count = MISSING
    """Length of the whole schedule, in steps."""
    start: Steps = 0
    """Step of the schedule at which the stage begins."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.of != MISSING and not 0 <= self.start < self.of:
            raise QatkitError(
                f"{self.start} is not a step in a schedule of {self.of} steps",
                key="start",
                advice="use 0 <= start < of",
            )
