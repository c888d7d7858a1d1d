"""The results of a sweep as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qatkit.report.comparison import FRONT, front
from qatkit.report.tables import comparison, headers
from qatkit.trials.grid import described, short_keys, value_text
from qatkit.trials.results import Result
from qatkit.trials.sweep import Trial

SHARED = "-"
"""The value of a swept key on which a shared stage does not depend."""


def keys_of(trials: Sequence[Trial]) -> list[str]:
    """Return the swept keys."""
    return list(dict.fromkeys(key for trial in trials for key in trial.values))


def result_table(results: Sequence[Result], keys: Sequence[str]) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Return the columns and the rows of comparable results; each cell is a value and a remark.

    Args:
        results: The results; ratios are relative to the first.
        keys: The swept keys.
    """
    report = {
        "rows": [result.row for result in results],
        "others": [],
        "baselines": [],
        "format": results[0].row["format"],
    }
    columns, cells = headers(report), [[_split(cell) for cell in row] for row in comparison(report)]
    short = short_keys(keys)
    chosen = pareto(results)
    rows = []
    for result, row, on_front in zip(results, cells, chosen, strict=True):
        values = [value_text(result.values[key]) if key in result.values else SHARED for key in keys]
        first = (row[0][0], FRONT if on_front else "")
        rows.append([first, *((value, "") for value in values), *row[1:]])
    return [columns[0], *(short[key] for key in keys), *columns[1:]], rows


def pareto(results: Sequence[Result]) -> list[bool]:
    """Return whether each result is on the Pareto front of metric, size and, if measured, latency.

    Files that failed verification, or whose metric is NaN or infinite, are left out.
    """
    passed = [result for result in results if result.row["verification"]["passed"]]
    joint = all(result.row["latency"] for result in results)
    chosen = front([(result.metric, result.data, result.row) for result in passed], joint)
    best = {id(result) for result, on_front in zip(passed, chosen, strict=True) if on_front}
    return [id(result) in best for result in results]


def numbers(trials: Sequence[int]) -> str:
    """Return the numbers of trials, with ranges.

    Example:
        >>> numbers([1, 2, 3, 5])
        '1-3, 5'
    """
    ranges: list[list[int]] = []
    for number in sorted(trials):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def comparable(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """Group results by their main metric and its data; numbers of different test data cannot be compared.

    Returns:
        The groups, each with the swept values that its results have in common. The text is empty for a single group.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.metric.name, result.data), []).append(result)
    several = len(groups) > 1
    return [(described(_common(group)) if several else "", group) for group in groups.values()]


def broken(result: Result) -> str:
    """Return the sentence about a file that failed verification."""
    several = "s" if len(result.trials) > 1 else ""
    where = f"configuration{several} {numbers(result.trials)}"
    return f"verification of '{result.row['file']}' failed in {where}: {result.row['verification']['text']}"


def _common(results: Sequence[Result]) -> dict[str, Any]:
    """The swept values that are equal in all results."""
    texts = [{key: value_text(value) for key, value in result.values.items()} for result in results]
    first = results[0].values
    return {key: value for key, value in first.items() if all(each.get(key) == texts[0][key] for each in texts)}


def _split(cell: str) -> tuple[str, str]:
    value, _, remark = cell.partition(" (")
    return value, remark.removesuffix(")")
