"""Read the training curves of a stage from its CSV logs."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from qatkit.errors import QatkitError

POINTS = 400
"""Maximum number of points per curve in a report; more would not be visible."""


class Curve(TypedDict):
    """A logged metric by optimizer step of a stage."""

    steps: list[int]
    values: list[float]


class Curves(TypedDict):
    """The metrics that a stage logged during training."""

    resumed_at: list[int]
    """The first logged step of every attempt except the first."""
    metrics: dict[str, Curve]


def read_curves(logs: Path) -> Curves:
    """Join the attempts of a stage into one curve per metric.

    A killed attempt may have continued past the checkpoint from which the next attempt resumed. If two attempts logged
    the same step, the later attempt takes precedence.

    Args:
        logs: A stage's ``logs`` folder with ``attempt_N/metrics.csv``; without such files, the curves are empty.

    Raises:
        QatkitError: a file is corrupted.
    """
    by_name: dict[str, dict[int, float]] = {}
    resumed_at = []
    for position, path in enumerate(sorted(logs.glob("attempt_*/metrics.csv"), key=_attempt)):
        rows = list(_numbers(path))
        first = min((step for step, _, _ in rows), default=0)
        if position and rows:
            resumed_at.append(first)
            by_name = {name: {s: v for s, v in points.items() if s < first} for name, points in by_name.items()}
        for step, name, value in rows:
            by_name.setdefault(name, {})[step] = value
    return Curves(resumed_at=resumed_at, metrics={name: _thinned(by_name[name]) for name in sorted(by_name)})


def _attempt(path: Path) -> int:
    return int(path.parent.name.removeprefix("attempt_"))


def _numbers(path: Path) -> Iterator[tuple[int, str, float]]:
    try:
        text = path.read_text(encoding="utf-8")
        # a killed process may leave an incomplete last line
        for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
            for name, number in row.items():
                if name not in ("epoch", "step") and number and row.get("step"):
                    yield int(row["step"]), name, float(number)
    except (ValueError, TypeError, csv.Error) as error:  # TypeError: a row is longer than the header
        raise QatkitError(
            f"{path} is corrupt ({error})",
            advice="restore the file, or delete it to omit this attempt's curves from the report",
        ) from error


def _thinned(points: dict[int, float]) -> Curve:
    steps = sorted(points)
    if len(steps) > POINTS:
        last = len(steps) - 1
        steps = [steps[round(i * last / (POINTS - 1))] for i in range(POINTS)]
    return Curve(steps=steps, values=[float(f"{points[step]:.6g}") for step in steps])
