"""The number that a run is judged by: the accuracy of a classifier, the perplexity of a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qatkit.tasks.table import TASKS


@dataclass(frozen=True)
class Metric:
    """How a metric is named, written and drawn."""

    name: str
    """Its key in ``stage.json`` after ``test/``, and in a row of the report after ``test_``."""
    per: str
    """What is counted: samples or tokens."""
    better: str
    """Where the better files are in a picture of it against cost."""
    unit: str
    percent: bool

    @property
    def title(self) -> str:
        return self.name.capitalize()

    @property
    def scale(self) -> float:
        """What values are multiplied with where they are drawn."""
        return 100.0 if self.percent else 1.0

    def show(self, value: float) -> str:
        """A value as people write it.

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
"""Those that a task may be judged by."""


def metric_of(report: dict[str, Any]) -> Metric:
    """What the rows of a report are judged by."""
    task = TASKS.row(report["rows"][0]["verification"]["task"], "report.json")
    return METRICS[task.metric]
