"""The candidates of a search: one format per layer group for each of several sizes, and the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qatkit.quantization.mixed.allocation import allocate, totals
from qatkit.quantization.mixed.overrides import allocated_layers, plain_layers
from qatkit.quantization.mixed.records import Sensitivity


@dataclass(frozen=True)
class Rung:
    """One choice of formats."""

    bytes: int
    """Size of the quantized weights."""
    increase: float
    """The predicted increase of the loss without training: the sum of the measured increases."""
    formats: dict[str, str]
    """The candidate of each layer group."""
    layers: dict[str, Any]
    """The same as ``quantize.layers`` of a recipe."""


def ladder(sensitivity: Sensitivity, count: int) -> list[Rung]:
    """Return choices of formats from the smallest to the largest, each with the least predicted loss for its size.

    Args:
        sensitivity: The measured loss increases.
        count: The number of sizes, which are evenly spaced on a logarithmic scale. Equal choices are merged.
    """
    sizes = [[option.bytes for option in group.options.values()] for group in sensitivity.groups]
    smallest, largest = sum(map(min, sizes)), sum(map(max, sizes))
    rungs: dict[int, Rung] = {}
    for index in range(count):
        budget = round(smallest * (largest / smallest) ** (index / max(count - 1, 1)))
        formats = allocate(sensitivity, budget_bytes=min(max(budget, smallest), largest))
        taken, increase = totals(sensitivity, formats)
        rungs.setdefault(taken, Rung(taken, increase, formats, plain_layers(allocated_layers(sensitivity, formats))))
    return [rungs[size] for size in sorted(rungs)]


@dataclass(frozen=True)
class Step:
    """One training of a search."""

    rung: int
    full: bool
    """Whether it had all of the recipe's steps."""
    lost: float
    """Loss of the metric on the validation split; see `Metric.lost`."""
    within: bool
    """Whether that is within the limit."""


def climb(rungs: int, limit: float, lost: Callable[[int, bool], float], share: float, budget: float) -> list[Step]:
    """Find the smallest rung within a limit: bisection with short trainings, then full ones, from small to large.

    The largest rung is tried first: if it loses too much, so do the others, and only full training may help. Bisection
    assumes that a larger rung loses less. The full training decides: if its rung loses too much, the next larger one
    is trained, until the budget is spent.

    Args:
        rungs: Number of rungs.
        limit: The largest loss of the metric.
        lost: ``(rung, full)``: train a rung, and return its loss of the metric.
        share: Cost of a short training relative to a full one.
        budget: Cost of all trainings, in full trainings; at least 1, so that one rung is fully trained.

    Returns:
        The trainings in order. The last one is the result if it is within the limit.

    Example:
        >>> steps = climb(8, 0.01, lambda rung, full: 0.08 - 0.01 * rung - 0.01 * full, share=0.25, budget=2.0)
        >>> [(step.rung, step.full, step.within) for step in steps]
        [(7, False, True), (3, False, False), (5, False, False), (6, False, False), (7, True, True)]
    """
    steps: list[Step] = []
    spent = 0.0

    def train(rung: int, full: bool) -> bool:
        nonlocal spent
        value = lost(rung, full)
        spent += 1.0 if full else share
        steps.append(Step(rung, full, value, value <= limit))
        return steps[-1].within

    top = rungs - 1
    low, high = (0, top) if spent + share + 1 <= budget and train(top, False) else (top, top)
    while low < high and spent + share + 1 <= budget + 1e-9:
        middle = (low + high) // 2
        low, high = (low, middle) if train(middle, False) else (middle + 1, high)
    for rung in range(high, rungs):
        if spent + 1 > max(budget, 1.0) + 1e-9 or train(rung, True):
            break
    return steps
