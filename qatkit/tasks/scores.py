"""Metrics of a task over a whole data split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.common.labels import IGNORED
from qatkit.errors import QatkitError
from qatkit.tasks.batches import answers, call, token_loss
from qatkit.tasks.inputs import InputCheck
from qatkit.tasks.table import TASKS, Task, task_of


class Scores:
    """Accumulates the metrics of a task over batches; every sample or token counts once.

    Args:
        task: The task declared by the data; by default it is inferred from the batches, see `task_of`.

    Example:
        >>> scores = Scores()
        >>> scores.add(torch.eye(4), (None, torch.tensor([0, 1, 2, 0])))
        >>> scores.metrics()
        {'accuracy': 0.75}
    """

    def __init__(self, task: Task | None = None) -> None:
        self.task = task
        self.right = 0.0
        self.count = 0
        self.loss = 0.0
        self._declared = task
        self._classes: Tensor | None = None  # right, predicted, true: [3, classes]

    @torch.no_grad()
    def add(self, logits: Tensor, batch: Any) -> None:
        """Count one batch.

        Args:
            logits: The result of `call`.
            batch: The batch it was called with.
        """
        self.task = task = task_of(batch, self._declared)
        rows, labels = answers(logits, batch, self._declared)
        predicted = rows.argmax(dim=-1)
        if "loss" in task.metrics:
            loss, counted = token_loss(rows, labels)
            self.loss += float(loss) * int(counted)
            self.count += int(counted)
        else:
            self.count += labels.numel()
        self.right += int((predicted == labels).sum())
        if "f1" in task.metrics:
            groups = (labels[predicted == labels], predicted[labels != IGNORED], labels[labels != IGNORED])
            counts = torch.stack([torch.bincount(group, minlength=rows.shape[-1]) for group in groups]).double().cpu()
            self._classes = counts if self._classes is None else self._classes + counts

    def sums(self) -> Tensor:
        """Return all counts as one vector, to be summed over processes."""
        own = torch.tensor([self.loss, self.right, self.count], dtype=torch.float64)
        return own if self._classes is None else torch.cat([own, self._classes.flatten()])

    def replaced(self, sums: Tensor) -> Scores:
        """Return scores computed from `sums`, reduced over all processes by sum or mean."""
        whole = Scores(self.task)
        (whole.loss, whole.right, count), rest = sums[:3].tolist(), sums[3:].cpu()
        whole.count = count
        whole._classes = rest.view(3, -1) if self._classes is not None else None
        return whole

    def metrics(self) -> dict[str, float]:
        """Return the task's metrics by name: accuracy and F1 from 0 to 1, the loss per label in nats.

        Perplexity is ``exp(loss)``. F1 is the mean, over the classes that occur, of the harmonic mean of precision and
        recall.

        Raises:
            QatkitError: there were tokens, but all of their labels are -100.
        """
        task = self.task or TASKS["classification"]  # as long as there was no batch
        if task.per_token and self.count == 0:
            raise QatkitError(
                f"every label is {IGNORED}, so there is nothing to score",
                key="data",
                advice="label the tokens to predict",
            )
        loss = self.loss / (self.count or 1)
        values: dict[str, Callable[[], float]] = {
            "loss": lambda: loss,
            "perplexity": lambda: perplexity(loss),
            "accuracy": lambda: self.right / (self.count or 1),
            "f1": self._f1,
        }
        return {name: values[name]() for name in task.metrics}

    def _f1(self) -> float:
        assert self._classes is not None
        right, predicted, true = self._classes
        occur = predicted + true > 0
        return float((2 * right / (predicted + true))[occur].mean())


def perplexity(loss: float) -> float:
    """Return ``exp(loss)`` of a loss in nats, capped at ``exp(700)``, because a float overflows soon after."""
    return math.exp(min(loss, 700.0))


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Any], declared: Task | None = None, split: str = ""
) -> dict[str, float]:
    """Return a model's metrics over all batches; every sample or token counts once.

    Args:
        model: The model; it is called as in `call`.
        batches: Batches of one task.
        declared: The task that the data declares; see `task_of`.
        split: The split that the batches are of, for the warning if they hold NaN or infinite values.
    """
    scores, inputs = Scores(declared), InputCheck()
    for batch in batches:
        inputs.add(batch)
        scores.add(call(model, batch), batch)
    inputs.warn(split)
    return scores.metrics()
