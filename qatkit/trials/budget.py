"""The budget of a search: full trainings, minutes or trainings of any length."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, TypeVar

from qatkit.errors import QatkitError

T = TypeVar("T")
Unit = Literal["runs", "minutes", "trials"]


class Budget:
    """What the trainings of a search may cost.

    Args:
        limit: The budget.
        unit: "runs": in full trainings; "minutes": of all trainings, where the next one is predicted from the previous
            ones; "trials": the number of trainings of any length.

    Example:
        >>> budget = Budget(2.0)
        >>> budget.timed(0.25, lambda: "a short training")
        'a short training'
        >>> budget.allows(0.5, 1.0), budget.allows(1.0, 1.0)
        (True, False)
    """

    def __init__(self, limit: float, unit: Unit = "runs") -> None:
        self.limit, self.unit = limit, unit
        self.shares: list[float] = []
        self.seconds = 0.0

    def allows(self, *shares: float) -> bool:
        """Whether trainings with these parts of all steps fit into what is left."""
        if self.unit == "runs":
            return sum(self.shares) + sum(shares) <= self.limit + 1e-9
        if self.unit == "trials":
            return len(self.shares) + len(shares) <= self.limit
        each = self.seconds / sum(self.shares) if self.shares else 0.0
        return self.seconds + each * sum(shares) <= 60 * self.limit

    def timed(self, share: float, training: Callable[[], T]) -> T:
        """Run a training, and charge it."""
        began = time.perf_counter()
        result = training()
        self.seconds += time.perf_counter() - began
        self.shares.append(share)
        return result

    @property
    def spent(self) -> str:
        """What the trainings have cost."""
        return f"{len(self.shares)} trainings, {sum(self.shares):.2f} full ones, {self.seconds / 60:.1f} minutes"


def parse_budget(text: str) -> Budget:
    """Read a budget such as 2, 30min or 6trials.

    Raises:
        QatkitError: it is none, or less than one full training.

    Example:
        >>> parse_budget("30min").unit, parse_budget("2").limit
        ('minutes', 2.0)
    """
    units: dict[str, Unit] = {"min": "minutes", "trials": "trials"}
    suffix = next((suffix for suffix in units if text.endswith(suffix)), "")
    try:
        limit = float(text.removesuffix(suffix))
    except ValueError:
        limit = 0.0
    if not (limit > 0 if suffix == "min" else limit >= 1) or limit == float("inf"):
        raise QatkitError(
            f"'{text}' is not a budget", key="--budget",
            advice="use full trainings such as 2 (at least 1), minutes such as 30min, or trainings such as 6trials",
        )  # fmt: skip
    return Budget(limit, units.get(suffix, "runs"))
