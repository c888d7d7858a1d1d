"""The ``lottery``, ``rewind`` and ``part`` blocks of a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qatkit.recipe.common import MISSING


@dataclass(frozen=True)
class LotteryConfig:
    """Iterative magnitude pruning with rewinding: train, prune a share of what is left, go back, train again.

    A stage ``ticket`` of `max_steps` steps with this block stands for the stages ``ticket_start`` (the steps up to the
    rewind point, where there are any), ``ticket_0`` (the dense training), ``ticket_1`` to ``ticket_ROUNDS`` and, with
    `reinit`, ``ticket_reinit``. More rounds later continue where these ended.
    """

    rounds: int = MISSING
    share: float = 0.2
    """Of the weights that are left, the share that each round prunes: after r rounds ``1 - (1 - share) ** r`` are
    zeros."""
    rewind: int | str = "init"
    """Where the kept weights go back to: ``init``, the weights before the stage (Frankle & Carbin, 2019); a number of
    steps, the weights after so many (Frankle et al., 2020); or ``learning_rate``: they stay, and only the schedule
    starts again (Renda et al., 2020)."""
    reinit: bool = False
    """Train the mask of the last round from fresh weights too: the control that a winning ticket is compared with."""
    scope: Literal["layer", "model"] = "layer"
    """Every layer to this share, or the smallest weights of all layers together."""
    include: list[str] = field(default_factory=lambda: ["*"])
    """Globs over layer names; every one must match a layer."""
    exclude: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.rounds != MISSING and self.rounds < 1:
            raise ValueError(f"rounds: {self.rounds} is out of range; write a whole number of at least 1")
        if not 0 < self.share < 1:
            raise ValueError(f"share: {self.share} is out of range; write a share between 0 and 1, such as 0.2")
        if isinstance(self.rewind, str) and self.rewind not in ("init", "learning_rate"):
            raise ValueError(f"rewind: '{self.rewind}' is unknown; write init, learning_rate or a number of steps")
        if isinstance(self.rewind, int) and self.rewind < 1:
            raise ValueError(f"rewind: {self.rewind} is out of range; write init, or at least 1 step")


@dataclass(frozen=True)
class RewindConfig:
    """Start with the weights of an earlier time, under the zeros that the stage has."""

    stage: str | None = None
    """The stage whose weights come back; null is the recipe's model before its first stage."""
    seed: int | None = None
    """Fresh weights of this seed instead."""

    def __post_init__(self) -> None:
        if self.stage is not None and self.seed is not None:
            raise ValueError(f"seed: {self.seed} and stage: {self.stage} are given; write one of them")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: {self.seed} is out of range; write a whole number from 0 to 2**63 - 1")


@dataclass(frozen=True)
class PartConfig:
    """The stage is a part of a longer learning-rate schedule."""

    of: int = MISSING
    """Steps of the whole schedule."""
    start: int = 0
    """The step of the schedule that the stage begins with."""

    def __post_init__(self) -> None:
        if self.of != MISSING and not 0 <= self.start < self.of:
            raise ValueError(f"start: {self.start} is no step of a schedule of {self.of}; write 0 <= start < of")
