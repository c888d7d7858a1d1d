"""torchmetrics metrics for the rows of a task; every function takes the task and the rows of a first batch.

Rows are those returned by `qatkit.tasks.answers`; labels of -100 are ignored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from qatkit.common.labels import IGNORED

if TYPE_CHECKING:
    from torchmetrics import Metric

    from qatkit.tasks.table import Task

# one process at a time computes a metric; `Scores.reduce` joins those of several
OPTIONS: dict[str, Any] = {"ignore_index": IGNORED, "validate_args": False, "sync_on_compute": False}


def accuracy(task: Task, rows: Tensor) -> Metric:
    """The fraction of rows, or of binary labels, that are predicted correctly."""
    from torchmetrics.classification import MulticlassAccuracy, MultilabelAccuracy

    if task.kind == "labels":
        return MultilabelAccuracy(rows.shape[-1], average="micro", **OPTIONS)
    return MulticlassAccuracy(rows.shape[-1], average="micro", **OPTIONS)


def f1(task: Task, rows: Tensor) -> Metric:
    """The harmonic mean of precision and recall, averaged over the classes that occur."""
    from torchmetrics.classification import MulticlassF1Score, MultilabelF1Score

    if task.kind == "labels":
        return MultilabelF1Score(rows.shape[-1], average="macro", **OPTIONS)
    return MulticlassF1Score(rows.shape[-1], average="macro", **OPTIONS)


def iou(task: Task, rows: Tensor) -> Metric:
    """Intersection over union (Jaccard index), averaged over the classes that occur."""
    from torchmetrics.classification import MulticlassJaccardIndex

    return MulticlassJaccardIndex(rows.shape[-1], average="macro", **OPTIONS)


def rmse(task: Task, rows: Tensor) -> Metric:
    """The root mean squared error over all values."""
    from torchmetrics.regression import MeanSquaredError

    return MeanSquaredError(squared=False, sync_on_compute=False)


def mae(task: Task, rows: Tensor) -> Metric:
    """The mean absolute error over all values."""
    from torchmetrics.regression import MeanAbsoluteError

    return MeanAbsoluteError(sync_on_compute=False)
