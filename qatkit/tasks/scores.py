"""Compute the metrics of a task over a whole data split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qatkit.common.labels import IGNORED
from qatkit.common.tables import implementation
from qatkit.errors import QatkitError
from qatkit.tasks.batches import answers, call, row_loss
from qatkit.tasks.inputs import InputCheck
from qatkit.tasks.metrics import METRICS
from qatkit.tasks.table import Task, task_of

if TYPE_CHECKING:
    from torchmetrics import Metric


class Scores:
    """Accumulates the metrics of a task over batches; every sample, pixel or token has equal weight.

    Args:
        task: The task that the data declares. By default, it is inferred from the batches; see `task_of`.

    Example:
        >>> scores = Scores()
        >>> scores.add(torch.eye(4), (None, torch.tensor([0, 1, 2, 0])))
        >>> scores.metrics()["accuracy"]
        0.75
    """

    def __init__(self, task: Task | None = None) -> None:
        self.task: Task | None = None
        """The task of the batches so far; None without a batch."""
        self.count = 0
        self.loss = 0.0
        """The sum of the losses of all counted labels."""
        self._declared = task
        self._metrics: dict[str, Metric] = {}

    @torch.no_grad()
    def add(self, logits: Tensor, batch: Any) -> None:
        """Add one batch.

        Args:
            logits: The result of `call`.
            batch: The batch with which it was called.
        """
        self.task = task = task_of(batch, self._declared)
        rows, labels = answers(logits, batch, self._declared)
        loss, counted = row_loss(rows, labels, task)
        self.loss += float(loss) * int(counted) if int(counted) else 0.0  # the mean of no label is NaN
        self.count += int(counted)
        if not self._metrics:
            rows_of = {name: METRICS.row(name, f"{task.name}.metrics") for name in task.metrics}
            self._metrics = {
                name: implementation(row.compute)(task, rows).to(rows.device)
                for name, row in rows_of.items()
                if row.compute
            }
        for metric in self._metrics.values():
            metric.update(rows.float(), labels if task.kind in ("values", "boxes") else labels.long())

    def reduce(self, mean: Callable[[Tensor], Tensor], processes: int, device: torch.device) -> None:
        """Combine the counts of all processes.

        Args:
            mean: Returns the mean of a tensor over all processes.
            processes: Number of processes.
            device: The device used for communication between processes.
        """
        if processes == 1:
            return
        sums = mean(torch.tensor([self.loss, self.count], device=device, dtype=torch.float32))
        self.loss, count = (float(value) * processes for value in sums)
        self.count = round(count)
        for metric in self._metrics.values():
            metric.sync()

    def metrics(self) -> dict[str, float]:
        """Return the task's metrics by name; empty if there were no batches.

        Fractions are from 0 to 1. The loss is per label, in nats or as squared error.

        Perplexity is ``exp(loss)``. The other metrics come from torchmetrics; see `qatkit.tasks.measures`.

        Raises:
            QatkitError: there were batches, but all of their labels are -100.
        """
        task = self.task
        if task is None:
            return {}
        if self.count == 0:
            raise QatkitError(
                f"every label is {IGNORED}, so no metric can be computed",
                key="data",
                advice="label the tokens that the model should predict" if task.per_token else "label the test data",
            )
        loss = self.loss / self.count
        own = {"loss": loss, "perplexity": perplexity(loss)}
        return {name: own[name] if name in own else float(self._metrics[name].compute()) for name in task.metrics}


def perplexity(loss: float) -> float:
    """Return ``exp(loss)`` of a loss in nats, capped at ``exp(700)`` to avoid float overflow."""
    return math.exp(min(loss, 700.0))


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Any], declared: Task | None = None, split: str = ""
) -> dict[str, float]:
    """Return a model's metrics over all batches; every sample or token has equal weight.

    Args:
        model: The model, called as in `call`.
        batches: Batches of one task.
        declared: The task that the data declares; see `task_of`.
        split: The split that contains the batches, for the warning about non-finite values.
    """
    scores, inputs = Scores(declared), InputCheck()
    for batch in batches:
        inputs.add(batch)
        scores.add(call(model, batch), batch)
    inputs.warn(split)
    return scores.metrics()
