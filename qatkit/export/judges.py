"""Score the outputs of a model over batches, with a task from the table or with a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.export.output_tensors import kinds, tensors
from qatkit.tasks import Scores, Task, agree, answers, task_of, to_logits

if TYPE_CHECKING:
    from torchmetrics import Metric


class Judge(Protocol):
    """Scores the outputs of one model, and counts agreements between two models."""

    def add(self, outputs: Any, batch: Any) -> None:
        """Score the outputs for one batch."""

    def agreements(self, ours: Any, theirs: Any, batch: Any) -> int:
        """Return the number of predictions that are equal in both outputs."""

    def value(self) -> float:
        """The metric over all batches."""

    @property
    def count(self) -> int:
        """Number of scored predictions."""

    @property
    def words(self) -> tuple[str, str, str]:
        """The names of the task and its metric, and the noun for the scored predictions."""


class TaskJudge:
    """Scores outputs by a task of the table.

    Args:
        task: The task that the data declares; None infers it from the batches.
    """

    def __init__(self, task: Task | None) -> None:
        self.scores = Scores(task)
        self.declared = task

    def add(self, outputs: Any, batch: Any) -> None:
        """Score one batch."""
        self.scores.add(to_logits(outputs), batch)

    def agreements(self, ours: Any, theirs: Any, batch: Any) -> int:
        """See `qatkit.tasks.agree`."""
        rows, labels = answers(to_logits(ours), batch, self.declared)
        others = answers(to_logits(theirs), batch, self.declared)[0]
        return int(agree(rows, others, labels, task_of(batch, self.declared)))

    def value(self) -> float:
        """The value of the task's metric."""
        return self.scores.metrics()[self._task.metric]

    @property
    def count(self) -> int:
        """Number of labels included in the metric."""
        return self.scores.count

    @property
    def words(self) -> tuple[str, str, str]:
        """The names and the noun in the task's row."""
        return self._task.name, self._task.metric, self._task.counted

    @property
    def _task(self) -> Task:
        assert self.scores.task is not None
        return self.scores.task


class MetricJudge:
    """Scores outputs by a torchmetrics metric.

    Args:
        metric: Updated with the outputs, and with the labels of the batch.
        class_dim: The class dimension of the outputs, whose argmax is the prediction. None compares all values with a
            tolerance of 1%.
    """

    def __init__(self, metric: Metric, class_dim: int | None) -> None:
        self.metric = metric.clone().cpu()  # where outputs are compared
        self.metric.reset()
        self.class_dim = class_dim
        self.count = 0

    def add(self, outputs: Any, batch: Any) -> None:
        """Update the metric, and count the predictions."""
        labels = _targets(batch)
        try:
            self.metric.update(outputs, labels)
        except Exception as error:  # a metric may raise anything on outputs that it does not accept
            raise QatkitError(
                f"{type(self.metric).__name__} does not accept the outputs ({kinds(outputs)}) with the labels "
                f"({kinds(labels)}): {error}",
                key="metric",
                advice="let forward return the outputs that the metric expects",
            ) from error
        self.count += sum(self._answers(output).numel() for output in tensors(outputs).values())

    def agreements(self, ours: Any, theirs: Any, batch: Any) -> int:
        """Compare the predictions in all outputs."""
        count = 0
        for name, output in tensors(ours).items():
            first, second = self._answers(output), self._answers(tensors(theirs)[name])
            same = first == second if self.class_dim is not None else torch.isclose(second, first, rtol=1e-2, atol=1e-6)
            count += int(same.sum())
        return count

    def value(self) -> float:
        """The metric over all batches."""
        computed = self.metric.compute()
        if not isinstance(computed, Tensor) or computed.numel() != 1:
            raise QatkitError(
                f"{type(self.metric).__name__} returns {kinds(computed)}, not a single number",
                key="metric",
                advice="use a metric that returns a single number, such as a subclass whose compute returns "
                'super().compute()["map"]',
            )
        return float(computed)

    @property
    def words(self) -> tuple[str, str, str]:
        """The metric's class name is used as the task name."""
        return "", type(self.metric).__name__, "values" if self.class_dim is None else "predictions"

    def _answers(self, output: Tensor) -> Tensor:
        if self.class_dim is None:
            return output
        if not -output.dim() <= self.class_dim < output.dim():
            raise QatkitError(
                f"an output of shape {list(output.shape)} has no dimension {self.class_dim}",
                key="class_dim",
                advice="pass the index of the class dimension, or let forward return the logits only",
            )
        return output.argmax(self.class_dim)


def _targets(batch: Any) -> Any:
    """Return the ``labels`` of a mapping, or the second part of a pair, of any type."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch["labels"]
    if isinstance(batch, list | tuple) and len(batch) > 1:
        return batch[1]
    seen = f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else kinds(batch)
    raise QatkitError(
        f"a batch ({seen}) contains no labels for the metric",
        key="batches",
        advice='pass pairs (inputs, labels), or {**batch, "labels": ...} for each batch',
    )
