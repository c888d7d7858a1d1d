"""The metric that a run is judged by, such as accuracy or perplexity."""

from __future__ import annotations

from typing import Any

from qatkit.tasks.metrics import METRICS, Metric
from qatkit.tasks.table import TASKS, Task

PERPLEXITY = METRICS["perplexity"]


def task_of_report(report: dict[str, Any]) -> Task:
    """The task of a run."""
    return TASKS.row(report["rows"][0]["verification"]["task"], "report.json")


def metric_of(report: dict[str, Any]) -> Metric:
    """The metric that the rows of a report are judged by."""
    return METRICS[task_of_report(report).metric]
