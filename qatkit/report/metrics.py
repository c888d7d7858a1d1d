"""The metric that a run is judged by, such as accuracy or perplexity, and its format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qatkit.tasks.table import TASKS


@dataclass(frozen=True)
class Metric:
    """The name, format and axis of a metric."""

    name: str
    """Its key: prefixed with ``test/`` in ``stage.json``, and with ``test_`` in a row of the report."""
    per: str
    """The counted unit: samples or tokens."""
    better: str
    """The corner of the better files in a figure of the metric against cost."""
    unit: str
    percent: bool

    @property
    def title(self) -> str:
        return self.name.capitalize()

    @property
    def scale(self) -> float:
        """The factor by which figures multiply values."""
        return 100.0 if self.percent else 1.0

    def show(self, value: float) -> str:
        """Format a value.

        Example:
            >>> ACCURACY.show(0.985), PERPLEXITY.show(12.3456), PERPLEXITY.show(123456.7)
            ('98.50%', '12.346', '1.235e+05')
        """
        return f"{value:.2%}" if self.percent else f"{value:.3f}" if value < 1e3 else f"{value:.4g}"

    def of(self, row: dict[str, Any]) -> float:
        """Its value on the test split, from a row of the report."""
        return float(row[f"test_{self.name}"])


ACCURACY = Metric("accuracy", "samples", "Up and to the left", "%", percent=True)
PERPLEXITY = Metric("perplexity", "tokens", "Down and to the left", "", percent=False)
METRICS = {metric.name: metric for metric in (ACCURACY, PERPLEXITY)}
"""The metrics that a task may be judged by."""


def metric_of(report: dict[str, Any]) -> Metric:
    """The metric that the rows of a report are judged by."""
    task = TASKS.row(report["rows"][0]["verification"]["task"], "report.json")
    return METRICS[task.metric]
