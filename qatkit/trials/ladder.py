"""The candidates of a search: one format per layer group for each of several costs, and the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qatkit.quantization.mixed.allocation import allocate, totals
from qatkit.quantization.mixed.overrides import allocated_layers
from qatkit.quantization.mixed.records import Sensitivity
from qatkit.schemes import Scheme
from qatkit.trials.budget import Budget

SHORT = 0.25
"""Part of the steps of a short training."""


@dataclass(frozen=True)
class Rung:
    """One choice of formats."""

    cost: int
    """The predicted cost: bytes of the quantized weights, or nanoseconds per call."""
    increase: float
    """The predicted increase of the loss without training: the sum of the measured increases."""
    formats: dict[str, str]
    """The candidate of each layer group."""
    layers: dict[str, Scheme]
    """The same as ``layers`` of `prepare_qat`."""


def ladder(sensitivity: Sensitivity, count: int, fixed: int = 0, most: int | None = None) -> list[Rung]:
    """Return choices of formats from the cheapest to the dearest, each with the least predicted loss for its cost.

    Args:
        sensitivity: The measured loss increases; the ``bytes`` of its options are any costs that add up.
        count: The number of costs, which are evenly spaced on a logarithmic scale. Equal choices are merged.
        fixed: The part of the cost that does not depend on the formats.
        most: The largest cost; None is that of all groups in their dearest format.
    """
    sizes = [[option.bytes for option in group.options.values()] for group in sensitivity.groups]
    smallest, largest = sum(map(min, sizes)), sum(map(max, sizes))
    low, high = max(fixed + smallest, 1), max(fixed + largest if most is None else most, 1)
    rungs: dict[int, Rung] = {}
    for index in range(count):
        budget = round(low * (high / low) ** (index / max(count - 1, 1))) - fixed
        formats = allocate(sensitivity, budget_bytes=min(max(budget, smallest), largest))
        taken, increase = totals(sensitivity, formats)
        rung = Rung(fixed + taken, increase, formats, allocated_layers(sensitivity, formats))
        rungs.setdefault(rung.cost, rung)
    return [rungs[cost] for cost in sorted(rungs)]


@dataclass(frozen=True)
class Step:
    """One training of a search, on the ladder of a variant."""

    rung: int
    share: float
    """Part of all steps; 0 is post-training quantization."""
    lost: float
    """Loss of the metric on the validation split; see `Metric.lost`."""
    bound: float
    """The largest loss that the validation split does not rule out; see `Promise.bound`."""
    within: bool
    """Whether the bound is within the limit."""
    variant: str = ""
    cost: int = 0


Train = Callable[[int, float], Step]
"""``(rung, share)``: train a rung with a part of the steps, and judge it on the validation split."""


def screen(rungs: int, train: Train) -> list[Step]:
    """Bisect the rungs without training, which costs nothing.

    Args:
        rungs: Number of rungs.
        train: Judges a rung.

    Returns:
        The steps; the cheapest one within the limit, if there is any, bounds the rungs that are worth training.
    """
    steps: list[Step] = []
    low, high = 0, rungs
    while low < high:
        middle = (low + high) // 2
        steps.append(train(middle, 0.0))
        low, high = (low, middle) if steps[-1].within else (middle + 1, high)
    return steps


def climb(rungs: int, train: Train, budget: Budget, known: Sequence[Step] = ()) -> list[Step]:
    """Find the cheapest rung within a limit: bisection with short trainings, then full ones, from cheap to dear.

    Bisection assumes that a dearer rung loses less. The full training decides: if its rung loses too much, the next
    dearer one is trained, until the budget is spent. If nothing is within the limit by then, a short training of the
    dearest rung is tried.

    Args:
        rungs: Number of rungs.
        train: Trains a rung.
        budget: The cost of all trainings; one rung is always fully trained.
        known: Steps on these rungs without training.

    Returns:
        The known steps and the trainings in order; see `chosen`.

    Example:
        >>> def train(rung, share):
        ...     lost = 0.08 - 0.01 * rung - 0.01 * share
        ...     return Step(rung, share, lost, lost, lost <= 0.01)
        >>> [(step.rung, step.share, step.within) for step in climb(8, train, Budget(2.0))]
        [(3, 0.25, False), (5, 0.25, False), (6, 0.25, False), (7, 1.0, True)]
    """
    steps = list(known)

    def trained(rung: int, share: float) -> bool:
        steps.append(budget.timed(share, lambda: train(rung, share)))
        return steps[-1].within

    low, high = 0, rungs - 1
    while low < high and budget.allows(SHORT, 1.0):
        middle = (low + high) // 2
        low, high = (low, middle) if trained(middle, SHORT) else (middle + 1, high)
    for rung in range(high, rungs):
        if (rung > high and not budget.allows(1.0)) or trained(rung, 1.0):
            break
    if not confirmed(steps) and budget.allows(SHORT):
        trained(rungs - 1, SHORT)
    return steps


def chosen(steps: list[Step]) -> Step:
    """Return the cheapest training that is confirmed to be within the limit; without one, the one that loses least."""
    if within := confirmed(steps):
        return min(within, key=lambda step: (step.rung, -step.share))
    return min(steps, key=lambda step: step.bound)


def confirmed(steps: list[Step]) -> list[Step]:
    """Return the trainings within the limit.

    A short training does not count if its rung, or a dearer one, failed with all steps: then it was luck.
    """
    refuted = max((step.rung for step in steps if step.share == 1.0 and not step.within), default=-1)
    return [step for step in steps if step.within and (step.share in (0.0, 1.0) or step.rung > refuted)]
