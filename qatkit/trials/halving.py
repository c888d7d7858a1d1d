"""Successive halving of the alternatives of a whole model: which is the cheapest that may keep the promise?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from qatkit.quantization.mixed.records import Sensitivity
from qatkit.trials.budget import Budget
from qatkit.trials.ladder import SHORT, Rung, Step
from qatkit.trials.variants import Variant


@dataclass(frozen=True)
class Ladder:
    """The choices of formats of one variant."""

    variant: Variant
    sensitivity: Sensitivity
    rungs: list[Rung]
    fixed: int = 0
    """The part of all costs that does not depend on the formats."""


def with_increases(sensitivity: Sensitivity, whole: Sensitivity) -> Sensitivity:
    """Return the measurement of a smaller model with the increases of the whole model, where groups have equal names.

    The smaller model is not trained yet, so its own losses say little about the formats of its layers.
    """
    known = {group.name: group.options for group in whole.groups}
    groups = [
        replace(
            group,
            options={
                name: replace(option, increase=known.get(group.name, group.options).get(name, option).increase)
                for name, option in group.options.items()
            },
        )
        for group in sensitivity.groups
    ]
    return replace(sensitivity, groups=tuple(groups))


def halve(
    ladders: Sequence[Ladder], judge: Callable[[Ladder, int, float], Step], budget: Budget, limit: float, most: int
) -> tuple[Ladder | None, list[Step], list[str]]:
    """Train all variants briefly, keep the better half, and repeat with twice the steps until one is left.

    Each variant has its dearest formats that cost less than `most`. Of the variants that lose at most twice the limit,
    the one with the cheapest formats is best: more training will reduce the loss. The others are ordered by their loss.

    Args:
        ladders: One per variant, without the whole model.
        judge: ``(ladder, rung, share)``: train with a part of all steps, and judge on the validation split.
        budget: The budget, of which one full training is left.
        limit: The largest loss.
        most: What the whole model costs without training.

    Returns:
        The remaining variant, or None if it is not promising; the trainings; and one sentence for every variant that
        was dropped.
    """
    share, left, steps, dropped = SHORT, list(ladders), list[Step](), list[str]()
    while left:
        judged: list[tuple[Step, Ladder]] = []
        for each in left:
            if budget.allows(share, 1.0):
                index = max((index for index, rung in enumerate(each.rungs) if rung.cost < most), default=0)
                judged.append((budget.timed(share, partial(judge, each, index, share)), each))
            else:
                dropped.append(f"{each.variant.name}: not trained further, because the budget is spent")
        if not judged:
            return (left[0] if steps else None), steps, dropped[1 if steps else 0 :]
        steps += [step for step, _ in judged]
        judged.sort(key=lambda pair: (0, pair[1].rungs[0].cost) if pair[0].lost <= 2 * limit else (1, pair[0].lost))
        kept = [pair for pair in judged[: max(1, len(judged) // 2)] if pair[0].lost <= 2 * limit]
        dropped += [
            f"{each.variant.name}: it loses {step.lost:.2%} with {share:.1%} of the steps"
            + (f", and {kept[0][0].variant} is cheaper" if step.lost <= 2 * limit else ", more than twice the limit")
            for step, each in judged[len(kept) :]
        ]
        left, share = [each for _, each in kept], 2 * share
        if len(left) == 1:
            return left[0], steps, dropped
    return None, steps, dropped
