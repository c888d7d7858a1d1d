"""When sparsity grows: a pure function of training progress."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qatkit.errors import QatkitError
from qatkit.pruning.masks import check_sparsity


@dataclass(frozen=True)
class Ramp:
    """Sparsity that grows fast at first and slowly at the end.

    ``final + (initial - final) * (1 - (progress - start) / (end - start)) ** power`` between `start` and `end`: Zhu and
    Gupta (2017, https://arxiv.org/abs/1710.01878), equation 1, where the power is 3.

    Args:
        final: Sparsity from `end` on, 0 to below 1.
        start: Progress, 0 to 1, at which it starts to grow.
        end: Progress at which it is reached; where it equals `start`, at once.
        initial: Sparsity until `start`, at most `final`.
        power: 1 is a straight line.

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
            raise QatkitError(f"ramp.initial: {self.initial} is above final, {self.final}; write a lower one")
        if not 0 <= self.start <= self.end <= 1:
            raise QatkitError(
                f"ramp: start {self.start} and end {self.end} are no part of training; write fractions of it with "
                "0 <= start <= end <= 1"
            )
        if not self.power > 0:
            raise QatkitError(f"ramp.power: {self.power} is out of range; write a number above 0, such as 3")

    def at(self, progress: float) -> float:
        """The sparsity at a training progress from 0 to 1."""
        if progress >= self.end:
            return self.final
        if progress <= self.start:
            return self.initial
        left = 1 - (progress - self.start) / (self.end - self.start)
        return self.final + (self.initial - self.final) * math.pow(left, self.power)
