"""The curves of a stage's training, read from what its CSV logger left."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

POINTS = 400
"""Points that a report keeps of each curve; more cannot be told apart on a page."""


class Curve(TypedDict):
    """One logged number over a stage's optimizer steps."""

    steps: list[int]
    values: list[float]


class Curves(TypedDict):
    """What a stage logged while it trained."""

    resumed_at: list[int]
    """The first logged step of every attempt but the first."""
    metrics: dict[str, Curve]


def read_curves(logs: Path) -> Curves:
    """Join the attempts of a stage into one curve per metric.

    A killed attempt may have gone beyond the checkpoint that the next one continued: where two attempts logged the same
    steps, the later one counts.

    Args:
        logs: A stage's ``logs`` folder with ``attempt_N/metrics.csv``; curves are empty where it has none.
    """
    found: dict[str, dict[int, float]] = {}
    resumed_at = []
    for position, path in enumerate(sorted(logs.glob("attempt_*/metrics.csv"), key=_attempt)):
        rows = list(_numbers(path))
        first = min((step for step, _, _ in rows), default=0)
        if position and rows:
            resumed_at.append(first)
            found = {name: {s: v for s, v in points.items() if s < first} for name, points in found.items()}
        for step, name, value in rows:
            found.setdefault(name, {})[step] = value
    return Curves(resumed_at=resumed_at, metrics={name: _thinned(found[name]) for name in sorted(found)})


def _attempt(path: Path) -> int:
    return int(path.parent.name.removeprefix("attempt_"))


def _numbers(path: Path) -> Iterator[tuple[int, str, float]]:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                # a killed process may leave the last line half written
                if name not in ("epoch", "step") and text and row.get("step"):
                    yield int(row["step"]), name, float(text)


def _thinned(points: dict[int, float]) -> Curve:
    steps = sorted(points)
    if len(steps) > POINTS:
        last = len(steps) - 1
        steps = [steps[round(i * last / (POINTS - 1))] for i in range(POINTS)]
    return Curve(steps=steps, values=[float(f"{points[step]:.6g}") for step in steps])
