"""The main metric of a run, such as accuracy or perplexity."""

from __future__ import annotations

from typing import Any

from qatkit.tasks.metrics import METRICS, Metric
from qatkit.tasks.table import TASKS, Task

PERPLEXITY = METRICS["perplexity"]


def task_of_report(report: dict[str, Any]) -> Task:
    """Return the task of a run."""
    return TASKS.row(report["rows"][0]["verification"]["task"], "report.json")


def metric_of(report: dict[str, Any]) -> Metric:
    """Return the main metric of a report."""
    return METRICS[task_of_report(report).metric]
