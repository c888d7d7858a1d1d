"""Successive halving of the alternatives of a whole model: at equal cost, which one loses least?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from qatkit.quantization.mixed.records import Sensitivity
from qatkit.trials.budget import Budget
from qatkit.trials.ladder import Rung, Step
from qatkit.trials.variants import Variant

FIRST = 0.125
"""Part of all steps in the first round; it doubles in each round."""


@dataclass(frozen=True)
class Ladder:
    """The choices of formats of one variant."""

    variant: Variant
    sensitivity: Sensitivity
    rungs: list[Rung]
    notes: list[str]
    """Measured latencies."""
    fixed: int = 0
    """The part of all costs that does not depend on the formats."""


def halve(
    ladders: Sequence[Ladder], judge: Callable[[Ladder, int, float], Step], budget: Budget
) -> tuple[Ladder, list[Step], list[str]]:
    """Train all variants briefly at about the same cost, keep the better half, and repeat until one is left.

    The first cost is the geometric mean of the cheapest and the dearest choice of the first variant. If the best
    variant is within the limit, the next cost is lower, otherwise higher.

    Args:
        ladders: One per variant; the first is the whole model.
        judge: ``(ladder, rung, share)``: train with a part of all steps, and judge on the validation split.
        budget: The budget, of which one full training is left.

    Returns:
        The remaining variant, the trainings, and one sentence for every variant that was dropped.
    """
    low, high = float(ladders[0].rungs[0].cost), float(ladders[0].rungs[-1].cost)
    cost, share = math.sqrt(low * high), FIRST
    left, steps, dropped = list(ladders), list[Step](), list[str]()
    while len(left) > 1:
        round_steps: list[tuple[Step, Ladder]] = []
        for each in left:
            if budget.allows(share, 1.0):
                step = budget.timed(share, partial(judge, each, _at(each, cost), share))
                round_steps.append((step, each))
            else:
                dropped.append(f"{each.variant.name}: not tried, because the budget is spent")
        if not round_steps:
            return left[0], steps, dropped[1:]
        steps += [step for step, _ in round_steps]
        round_steps.sort(key=lambda pair: pair[0].lost)
        best = round_steps[0][0]
        kept = round_steps[: max(1, len(left) // 2)]
        dropped += [
            f"{each.variant.name}: at about the same cost, it loses {step.lost:.2%} with {share:.1%} of the steps, and "
            f"{best.variant} {best.lost:.2%}"
            for step, each in round_steps[len(kept) :]
        ]
        left, share = [each for _, each in kept], 2 * share
        low, high = (low, cost) if best.within else (cost, high)
        cost = math.sqrt(low * high)
    return left[0], steps, dropped


def _at(each: Ladder, cost: float) -> int:
    """The dearest rung that costs at most this much, or the cheapest one."""
    return max((index for index, rung in enumerate(each.rungs) if rung.cost <= cost), default=0)
