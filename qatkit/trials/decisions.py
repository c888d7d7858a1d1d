"""Why a search gave each layer group its format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qatkit.quantization.mixed.records import Group, Option, Sensitivity
from qatkit.trials.ladder import Rung


@dataclass(frozen=True)
class Decision:
    """The format of one layer group, with the measurements behind it."""

    group: str
    format: str
    why: str
    options: dict[str, Option]
    """Cost and measured increase of the loss of every candidate; the cost is in bytes or nanoseconds."""


def decisions(sensitivity: Sensitivity, rung: Rung, shown: Callable[[int], str]) -> list[Decision]:
    """Explain a choice of formats.

    The integer program spends a cost where it lowers the loss most. So each sentence says what the next cheaper and the
    next dearer candidate would change.

    Args:
        sensitivity: The measured increases.
        rung: The choice.
        shown: Formats a cost.

    Example:
        >>> from qatkit import scheme
        >>> options = {"W8A16": Option(80, 0.0), "W4A16": Option(40, 0.5)}
        >>> candidates = {name: scheme(name) for name in options}
        >>> measured = Sensitivity(1.0, candidates, (Group(("head",), 80, options),))
        >>> rung = Rung(80, 0.0, {"head": "W8A16"}, {"head": candidates["W8A16"]})
        >>> decisions(measured, rung, "{:,} bytes".format)[0].why
        'W4A16 saves 40 bytes and raises the loss by 0.5'
    """
    return [
        Decision(group.name, rung.formats[group.name], _why(group, rung.formats[group.name], shown), group.options)
        for group in sensitivity.groups
    ]


def _why(group: Group, name: str, shown: Callable[[int], str]) -> str:
    own = group.options[name]
    others = {other: option for other, option in group.options.items() if other != name}
    worse = {o: x for o, x in others.items() if x.bytes >= own.bytes and x.cost >= own.cost}
    cheaper = {o: x for o, x in others.items() if x.bytes < own.bytes}
    dearer = {o: x for o, x in others.items() if x.bytes > own.bytes and x.cost < own.cost}
    parts = []
    if cheaper:
        other = max(cheaper, key=lambda each: cheaper[each].bytes)
        parts.append(f"{other} saves {shown(own.bytes - cheaper[other].bytes)} and {_change(cheaper[other], own)}")
    if dearer:
        other = min(dearer, key=lambda each: dearer[each].bytes)
        parts.append(f"{other} adds {shown(dearer[other].bytes - own.bytes)} and {_change(dearer[other], own)}")
    if worse and not dearer:
        parts.append(f"{' and '.join(worse)} would be neither cheaper nor better")
    return "; ".join(parts) or "it is the only candidate that fits"


def _change(option: Option, own: Option) -> str:
    change = option.cost - own.cost
    if change == 0:
        return "does not change the loss"
    return f"{'raises' if change > 0 else 'lowers'} the loss by {abs(change):.3g}"
