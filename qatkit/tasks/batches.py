"""Call a model on a batch of any task: inputs, logits, predictions and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qatkit.common.labels import IGNORED
from qatkit.common.tables import implementation
from qatkit.errors import QatkitError
from qatkit.tasks.detection import own_loss
from qatkit.tasks.table import Task, task_of

NOT_INPUTS = ("labels", "task", "pooling", "start_positions", "end_positions")
"""Keys of a batch that are not passed to the model."""


def model_inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments for a model call: the batch without its labels."""
    if isinstance(batch, Mapping):
        return (), {key: value for key, value in batch.items() if key not in NOT_INPUTS}
    return (batch[0],), {}


def to_logits(output: Any) -> Tensor:
    """Return the logits of a model's output: a tensor, or the ``logits`` of a mapping or an object.

    For an encoder without a head, its last hidden states are returned; for extractive question answering, the start and
    end logits, ``[batch, 2, tokens]``; and for object detection, the logits and boxes of each query, ``[batch, queries,
    classes + 4]``.

    Raises:
        QatkitError: the output contains none of these.
    """
    logits = output
    for name in ("last_hidden_state", "logits"):
        logits = _entry(output, name, logits)
    ends = [_entry(output, name, None) for name in ("start_logits", "end_logits")]
    if all(isinstance(end, Tensor) for end in ends):
        return torch.stack(ends, dim=1)
    if isinstance(logits, Tensor) and isinstance(boxes := _entry(output, "pred_boxes", None), Tensor):
        return torch.cat([logits, boxes], dim=-1)
    if not isinstance(logits, Tensor):
        raise QatkitError(
            f"the model returned {type(output).__name__} without logits",
            key="model",
            advice="return a tensor, or an object with .logits",
        )
    return logits


def _entry(output: Any, name: str, default: Any) -> Any:
    return output.get(name, default) if isinstance(output, Mapping) else getattr(output, name, default)


def call(model: Callable[..., Any], batch: Any) -> Tensor:
    """Return the model's logits for a batch in their original shape."""
    args, kwargs = model_inputs(batch)
    return to_logits(model(*args, **kwargs))


def one_sample(batch: Any) -> Any:
    """Return the first sample of a batch, as a batch of one."""
    if isinstance(batch, Mapping):
        return {key: value[:1] for key, value in batch.items()}
    return [part[:1] for part in batch]


def answers(logits: Tensor, batch: Any, declared: Task | None = None) -> tuple[Tensor, Tensor]:
    """Return logits and labels with one row per prediction: ``[rows, classes]`` and ``[rows]``.

    A row is a sample, a pixel, a token position, or a text among partners, depending on the batch's task; a label may
    be `IGNORED`. Shapes differ for some kinds of tasks; see `Task.kind`.

    Args:
        logits: The result of `call`.
        batch: The batch with which it was called.
        declared: The task that the data declares; see `task_of`.

    Raises:
        QatkitError: the batch has no labels, or they do not match the logits.

    Example:
        >>> import torch
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
        >>> rows, labels = answers(torch.zeros(1, 3, 10), batch)
        >>> rows.shape, labels.tolist()
        (torch.Size([2, 10]), [6, 7])
    """
    rows, labels = implementation(task_of(batch, declared).answers)(logits, batch)
    return rows, labels


def mean_loss(model: Callable[..., Any], batch: Any, declared: Task | None = None) -> Tensor:
    """Return the mean loss over the samples or tokens of a batch, with its autograd graph; see `counted_loss`."""
    return counted_loss(model, batch, declared)[0]


def counted_loss(model: Callable[..., Any], batch: Any, declared: Task | None = None) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch with its autograd graph, and the number of labels over which it is averaged.

    The loss is `row_loss`, or the model's own if the task is object detection.
    """
    task = task_of(batch, declared)
    if task.kind == "boxes":
        return own_loss(model, batch)[1], torch.tensor(len(batch["labels"]))
    return row_loss(*answers(call(model, batch), batch, declared), task)


def row_loss(rows: Tensor, labels: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Return the mean loss over the labels other than -100, and their number.

    Args:
        rows: As returned by `answers`.
        labels: As returned by `answers`.
        task: The task, whose kind determines the loss: cross-entropy, binary cross-entropy or mean squared error. For
            boxes, whose loss the model computes, the result is 0 and the number of queries.
    """
    if task.kind == "boxes":
        return rows.new_zeros(()), torch.tensor(rows.shape[:2].numel())
    if task.kind == "values":
        return F.mse_loss(rows.float(), labels.float()), torch.tensor(labels.numel())
    if task.kind == "labels":
        counted = labels != IGNORED
        each = F.binary_cross_entropy_with_logits(rows.float(), labels.float(), reduction="none")
        return torch.where(counted, each, 0.0).sum() / counted.sum().clamp(min=1), counted.sum()
    if task.per_token:
        return token_loss(rows, labels)
    return F.cross_entropy(rows, labels), (labels != IGNORED).sum()


def agree(ours: Tensor, theirs: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Return the number of labels other than -100 for which two models make the same prediction.

    Args:
        ours: Rows from `answers`.
        theirs: The rows of the other model.
        labels: As returned by `answers`.
        task: The task, whose kind determines which predictions are the same: equal classes, values on the same side of
            0, or values within 1%. Boxes are the same if their classes are equal and their sides differ by at most 1%
            of the image size.
    """
    if task.kind == "values":
        return torch.isclose(theirs, ours, rtol=1e-2, atol=1e-6).sum()
    if task.kind == "boxes":
        near = ((theirs[..., -4:] - ours[..., -4:]).abs() <= 1e-2).all(-1)
        return (near & (ours[..., :-4].argmax(-1) == theirs[..., :-4].argmax(-1))).sum()
    same = (ours > 0) == (theirs > 0) if task.kind == "labels" else ours.argmax(-1) == theirs.argmax(-1)
    return (same & (labels != IGNORED)).sum()


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean float32 cross-entropy over the labels other than -100, and their number; 0 if there are none.

    Args:
        logits: ``[rows, vocabulary]``.
        labels: ``[rows]``, int64.
    """
    count = (labels != IGNORED).sum()
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / count.clamp(min=1), count
