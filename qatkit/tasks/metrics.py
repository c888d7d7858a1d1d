"""The table of task metrics, shared by validation, verification and report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qatkit.common.tables import Table


@dataclass(frozen=True)
class Metric:
    """A metric, with its direction, display format and computation."""

    name: str
    """The metric's key, prefixed with ``val/`` and ``test/`` in ``stage.json``, and with ``test_`` in a row of the
    report.
    """
    higher_is_better: bool
    percent: bool = False
    """Whether it is displayed in percent."""
    counts: bool = False
    """Whether it is a fraction of independent predictions, so that its noise follows from their number. Pixels of an
    image are not independent.
    """
    title: str = ""
    """The metric's name in the report. The default is the capitalized `name`."""
    compute: str = ""
    """``module:function(task, rows)`` that returns a `torchmetrics.Metric`; empty for metrics derived from the loss.
    """

    def __post_init__(self) -> None:
        if not self.title:
            object.__setattr__(self, "title", self.name.capitalize())

    @property
    def better(self) -> str:
        """The direction of better results in a plot of the metric against cost."""
        return "Up and to the left" if self.higher_is_better else "Down and to the left"

    @property
    def unit(self) -> str:
        return "%" if self.percent else ""

    @property
    def scale(self) -> float:
        """The factor by which figures scale values."""
        return 100.0 if self.percent else 1.0

    def show(self, value: float) -> str:
        """Format a value.

        Example:
            >>> METRICS["accuracy"].show(0.985), METRICS["perplexity"].show(12.3456), METRICS["rmse"].show(123456.7)
            ('98.50%', '12.346', '1.235e+05')
        """
        return f"{value:.2%}" if self.percent else f"{value:.3f}" if value < 1e3 else f"{value:.4g}"

    def lost(self, before: float, after: float) -> float:
        """Return how much worse a value is than another: a difference if they are in percent, else relative.

        Example:
            >>> round(METRICS["accuracy"].lost(0.99, 0.98), 4), round(METRICS["perplexity"].lost(10.0, 10.1), 4)
            (0.01, 0.01)
        """
        worse = before - after if self.higher_is_better else after - before
        return worse if self.percent else worse / abs(before)

    def of(self, row: dict[str, Any]) -> float:
        """Return the metric's value on the test split, from a row of the report."""
        return float(row[f"test_{self.name}"])


METRICS: Table[Metric] = Table(
    "metric",
    [
        Metric("loss", higher_is_better=False),
        Metric("perplexity", higher_is_better=False),
        Metric("accuracy", higher_is_better=True, percent=True, counts=True, compute="qatkit.tasks.measures:accuracy"),
        Metric("f1", title="F1", higher_is_better=True, counts=True, compute="qatkit.tasks.measures:f1"),
        Metric("iou", title="IOU", higher_is_better=True, compute="qatkit.tasks.measures:iou"),
        Metric("map", title="mAP", higher_is_better=True, compute="qatkit.tasks.mean_precision:mean_precision"),
        Metric("rmse", title="RMSE", higher_is_better=False, compute="qatkit.tasks.measures:rmse"),
        Metric("mae", title="MAE", higher_is_better=False, compute="qatkit.tasks.measures:mae"),
    ],
)
