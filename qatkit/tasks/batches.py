"""Call a model on a batch, for every task: inputs, logits, answers and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from qatkit.common.labels import IGNORED
from qatkit.common.tables import implementation
from qatkit.errors import QatkitError
from qatkit.tasks.table import Task, task_of

NOT_INPUTS = ("labels", "task", "pooling")
"""Keys of a batch that are not passed to the model."""


def model_inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments of a model's call: the batch without its labels."""
    if isinstance(batch, Mapping):
        return (), {key: value for key, value in batch.items() if key not in NOT_INPUTS}
    return (batch[0],), {}


def to_logits(output: Any) -> Tensor:
    """Return the logits of a model's output: a tensor, or the ``logits`` of a mapping or an object.

    For an encoder without a head, return its last hidden states.

    Raises:
        QatkitError: the output has neither.
    """
    logits = output
    for name in ("last_hidden_state", "logits"):
        logits = output.get(name, logits) if isinstance(output, Mapping) else getattr(output, name, logits)
    if not isinstance(logits, Tensor):
        raise QatkitError(
            f"it returned {type(output).__name__} without logits",
            key="model",
            advice="return a tensor, or an object with .logits",
        )
    return logits


def call(model: Callable[..., Any], batch: Any) -> Tensor:
    """Return the model's logits for a batch, in the model's own shape."""
    args, kwargs = model_inputs(batch)
    return to_logits(model(*args, **kwargs))


def one_sample(batch: Any) -> Any:
    """Return the first sample of a batch, as a batch of one."""
    if isinstance(batch, Mapping):
        return {key: value[:1] for key, value in batch.items()}
    return [part[:1] for part in batch]


def answers(logits: Tensor, batch: Any, declared: Task | None = None) -> tuple[Tensor, Tensor]:
    """Return logits and labels with one row per prediction: ``[rows, classes]`` and ``[rows]``.

    A row is a sample, a position of a text, or a text among partners, depending on the batch's task; a label may be
    `IGNORED`.

    Args:
        logits: The result of `call`.
        batch: The batch it was called with.
        declared: The task that the data declares; see `task_of`.

    Raises:
        QatkitError: the batch has no labels, or they do not match the logits.

    Example:
        >>> import torch
        >>> import torch
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
        >>> rows, labels = answers(torch.zeros(1, 3, 10), batch)
        >>> rows.shape, labels.tolist()
        (torch.Size([2, 10]), [6, 7])
    """
    rows, labels = implementation(task_of(batch, declared).answers)(logits, batch)
    return rows, labels


def mean_loss(model: Callable[..., Any], batch: Any, declared: Task | None = None) -> Tensor:
    """Return the cross-entropy of a batch with its graph: the mean over its samples or tokens."""
    logits, labels = answers(call(model, batch), batch, declared)
    per_token = task_of(batch, declared).per_token
    return token_loss(logits, labels)[0] if per_token else F.cross_entropy(logits, labels)


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy over the labels other than -100, in float32, and their number; 0 if none.

    Args:
        logits: ``[rows, vocabulary]``.
        labels: ``[rows]``, int64.
    """
    count = (labels != IGNORED).sum()
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / count.clamp(min=1), count
