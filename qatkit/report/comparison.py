"""The comparison of multiple runs: one table with the Pareto front, common figures, and the differences between the
recipes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]  # PyYAML has no types of its own

from qatkit.report.metrics import metric_of
from qatkit.report.sections import Entry, baseline_rows, merged_table, tradeoffs_of
from qatkit.report.svg import SERIES
from qatkit.report.tables import comparison, files_of
from qatkit.tasks.metrics import Metric

FRONT = "on the Pareto front"


def compared(reports: Sequence[dict[str, Any]], names: Sequence[str], joint: bool) -> dict[str, Any]:
    """Return the page's values for all runs together.

    Args:
        reports: The content of each ``report.json``.
        names: The names of the runs on the page.
        joint: Whether all latencies were measured in one process, and are comparable.
    """
    columns, rows = merged_table(reports)
    owners = [index for index, report in enumerate(reports) for _ in comparison(report)]
    shown = [[*files_of(report), *baseline_rows(report, metric_of(report))] for report in reports]
    entries: dict[Metric, list[Entry]] = {}
    for index, (report, name) in enumerate(zip(reports, names, strict=True)):
        entries.setdefault(metric_of(report), []).extend(
            (row, str(index + 1), f"{name}, {row['file']}", SERIES[index % len(SERIES)]) for row in shown[index]
        )
    metrics = [metric_of(report) for report in reports]
    data = [json.dumps(yaml.safe_load(report["recipe"]).get("data"), default=str) for report in reports]
    kinds = zip(metrics, data, shown, strict=True)
    best = front([(metric, same, row) for metric, same, own in kinds for row in own], joint)
    for cells, chosen in zip(rows, best, strict=True):
        cells[0] = (cells[0][0], FRONT if chosen else "")
    return {
        "columns": columns,
        "rows": [(owner, names[owner], row) for owner, row in zip(owners, rows, strict=True)],
        "joint": joint,
        "recipes": recipe_differences([report["recipe"] for report in reports], names),
        "colours": len(SERIES),
        # files with different metrics cannot share an axis
        "tradeoffs": [(metric, tradeoffs_of(f"all-{metric.name}", metric, own)) for metric, own in entries.items()],
        "failed": [
            f"{name}, {row['file']}"
            for report, name in zip(reports, names, strict=True)
            for row in files_of(report)
            if not row["verification"]["passed"]
        ],
    }


def front(rows: Sequence[tuple[Metric, str, dict[str, Any]]], joint: bool) -> list[bool]:
    """Return whether each file is on the Pareto front: no other file matches it everywhere and beats it somewhere.

    Files are compared by metric, size and, if they were measured together, by latency at each batch size. Files with
    different metrics, or with metrics on different data, are not compared. A file whose metric is NaN or infinite is
    not on the front.

    Args:
        rows: The metric, the data and the row of the report of each file.
        joint: Whether the latencies are comparable.
    """
    costs = [_costs(metric, row, joint) for metric, _, row in rows]
    return [
        math.isfinite(own["metric"])
        and not any(
            (metric, data) == other[:2] and theirs.keys() == own.keys() and _dominates(theirs, own)
            for other, theirs in zip(rows, costs, strict=True)
        )
        for (metric, data, _), own in zip(rows, costs, strict=True)
    ]


def _costs(metric: Metric, row: dict[str, Any], joint: bool) -> dict[str, float]:
    """What should be small."""
    value = metric.of(row)
    latency = {f"batch of {each['batch_size']}": each["median_ms"] for each in row["latency"]} if joint else {}
    return {"metric": -value if metric.higher_is_better else value, "bytes": row["bytes"]} | latency


def _dominates(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return all(one[key] <= other[key] for key in one) and any(one[key] < other[key] for key in one)


def recipe_differences(recipes: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """Return a header and one row per key whose value is not the same in all recipes; empty if there is none.

    Args:
        recipes: Recipes in YAML.
        names: The names of the runs.

    Example:
        >>> recipe_differences(["seed: 1\\nstages: {a: {lr: 0.1}}", "seed: 1\\nstages: {a: {lr: 0.2}}"], ["x", "y"])
        [['key', 'x', 'y'], ['stages.a.lr', '0.1', '0.2']]
    """
    values = [_flat(yaml.safe_load(recipe)) for recipe in recipes]
    keys = dict.fromkeys(key for each in values for key in each)
    differing = [key for key in keys if len({each.get(key, "-") for each in values}) > 1]
    return (
        [["key", *names], *([key, *(each.get(key, "-") for each in values)] for key in differing)] if differing else []
    )


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree if isinstance(tree, str) else json.dumps(tree, default=str)}
    nested = [_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items()]
    return {key: value for part in nested for key, value in part.items()}
