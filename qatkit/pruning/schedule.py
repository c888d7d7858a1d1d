"""The sparsity schedule, a pure function of training progress."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qatkit.errors import QatkitError
from qatkit.pruning.masks import check_sparsity


@dataclass(frozen=True)
class Ramp:
    """Sparsity schedule that rises quickly at first and slowly at the end.

    Between `start` and `end`, the sparsity is ``final + (initial - final) * (1 - (progress - start) / (end - start)) **
    power``. With a power of 3, this is equation 1 of Zhu and Gupta (2017, https://arxiv.org/abs/1710.01878).

    Args:
        final: Sparsity after `end`, from 0 to below 1.
        start: Training progress, from 0 to 1, at which sparsity starts to rise.
        end: Training progress at which sparsity reaches `final`; equal to `start` for a single step.
        initial: Sparsity before `start`, at most `final`.
        power: Exponent of the curve; 1 is linear.

    Raises:
        QatkitError: a value is out of range.

    Example:
        >>> from qatkit.pruning.schedule import Ramp
        >>> [round(Ramp(0.8, end=0.5).at(progress), 3) for progress in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 0.7, 0.8, 0.8]
    """

    final: float
    start: float = 0.0
    end: float = 1.0
    initial: float = 0.0
    power: float = 3.0

    def __post_init__(self) -> None:
        check_sparsity("ramp.final", self.final)
        check_sparsity("ramp.initial", self.initial)
        if self.initial > self.final:
            raise QatkitError(
                f"{self.initial} is above final={self.final}", key="ramp.initial", advice="use a lower value"
            )
        if not 0 <= self.start <= self.end <= 1:
            raise QatkitError(
                f"start={self.start} and end={self.end} are out of range",
                key="ramp",
                advice="use fractions of training with 0 <= start <= end <= 1",
            )
        if not self.power > 0:
            raise QatkitError(
                f"{self.power} is out of range", key="ramp.power", advice="use a positive number, such as 3"
            )

    def at(self, progress: float) -> float:
        """Return the sparsity at a training progress from 0 to 1."""
        if progress >= self.end:
            return self.final
        if progress <= self.start:
            return self.initial
        left = 1 - (progress - self.start) / (self.end - self.start)
        return self.final + (self.initial - self.final) * math.pow(left, self.power)
