"""Classification: one class per sample, from a pair of inputs and labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.tasks.labels import labels_of


def answers(logits: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Return logits ``[batch, classes]`` and labels ``[batch]`` unchanged.

    Raises:
        QatkitError: the shapes belong to a different task; the error includes its name.
    """
    labels = labels_of(batch)
    if logits.dim() == 2 and labels.shape == logits.shape[:1] and not labels.is_floating_point():
        return logits, labels
    kind = "float" if labels.is_floating_point() else "integer"
    raise QatkitError(
        f"{kind} labels of shape {list(labels.shape)} and outputs of shape {list(logits.shape)} do not contain one "
        "class per sample",
        key="task",
        advice=f"declare another task: {_likely(logits, labels)}",
    )


def _likely(logits: Tensor, labels: Tensor) -> str:
    """The tasks whose shapes these are."""
    if labels.is_floating_point() or labels.shape == logits.shape:
        return "regression or multilabel"
    if logits.dim() > 2 and labels.shape == logits.shape[:-1]:
        return "token_classification, or segmentation with the classes in dimension 1"
    return "segmentation" if logits.dim() > 2 else "one of the tasks in qatkit.tasks.TASKS"
