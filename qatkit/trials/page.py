"""The page of a sweep: one table with the Pareto front, figures, the best files under a constraint, and the recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qatkit.recipe.loading import recipe_to_yaml
from qatkit.report.comparison import recipe_differences
from qatkit.report.page import template
from qatkit.report.sections import tradeoffs_of
from qatkit.report.svg import KINDS, SERIES
from qatkit.trials.best import best_files, dense_result
from qatkit.trials.grid import short_keys, value_text
from qatkit.trials.results import Result
from qatkit.trials.sweep import Trial
from qatkit.trials.tables import broken as sentence
from qatkit.trials.tables import comparable, keys_of, numbers, result_table


def render(title: str, trials: Sequence[Trial], results: Sequence[Result], failures: Mapping[int, str]) -> str:
    """Render the page.

    Args:
        title: The name of the sweep.
        trials: All trials.
        results: The results of those that finished.
        failures: Why the others failed, by number.
    """
    keys = keys_of(trials)
    differences = recipe_differences(
        [recipe_to_yaml(trial.run.recipe) for trial in trials], [str(trial.number) for trial in trials]
    )
    broken = [result for result in results if not result.row["verification"]["passed"]]
    text: str = template("sweep.html.j2").render(
        title=title,
        trials=trials,
        keys=keys,
        groups=[_group(index, name, own, keys) for index, (name, own) in enumerate(comparable(results))],
        failures=failures,
        broken=[sentence(each) for each in broken],
        broken_stages={
            trial.number: list(dict.fromkeys(each.row["file"] for each in broken if trial.number in each.trials))
            for trial in trials
        },
        differences=[row for row in differences[1:] if row[0] != "name"],
        base=recipe_to_yaml(trials[0].run.recipe),
    )
    return text


def _group(index: int, name: str, results: Sequence[Result], keys: Sequence[str]) -> dict[str, Any]:
    """What the page shows of comparable results."""
    metric = results[0].metric
    columns, rows = result_table(results, keys)
    first = keys[0]
    values = list(dict.fromkeys(value_text(result.values[first]) for result in results if first in result.values))
    entries = []
    for result in results:
        value = value_text(result.values[first]) if first in result.values else None
        colour = KINDS["dense"] if value is None else SERIES[values.index(value) % len(SERIES)]
        label = numbers(result.trials) if result.last else result.row["stage"]
        words = ", ".join(
            [result.row["stage"], *(f"{key}={value_text(value)}" for key, value in result.values.items())]
        )
        entries.append((result.row, label, words, colour))
    joint = all(result.row["latency"] for result in results)
    key = f"{metric.name}-{index}" if index else metric.name
    return {
        "id": key,
        "name": name,
        "metric": metric,
        "columns": columns,
        "rows": [(numbers(result.trials), row) for result, row in zip(results, rows, strict=True)],
        "joint": joint,
        "legend": [(value, index % len(SERIES)) for index, value in enumerate(values)],
        "key": short_keys(keys)[first],
        "tradeoffs": tradeoffs_of(f"sweep-{key}", metric, entries),
        "best": _best(results),
    }


def _best(results: Sequence[Result]) -> dict[str, Any]:
    found, reference = best_files(results), dense_result(results)
    goals = list(dict.fromkeys(each.goal for each in found))
    limits: dict[str, list[tuple[str, str]]] = {}
    for each in found:
        limits.setdefault(each.limit, []).append((each.value, _name(each.result)))
    shown = "" if reference is None else reference.metric.show(reference.metric.of(reference.row))
    return {"columns": goals, "rows": list(limits.items()), "reference": shown}


def _name(result: Result) -> str:
    return f"configuration {numbers(result.trials)}, {result.row['stage']}"
