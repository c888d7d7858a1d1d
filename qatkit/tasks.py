"""What a batch asks of a model: a class per sample, or the next token at every place of a text.

A pair ``(inputs, labels)`` is a classification. A mapping, as models of transformers take it, asks for the next token
where the logits have a place per token, ``[batch, tokens, vocabulary]``; otherwise it is a classification too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.errors import QatkitError

IGNORED = -100
"""The label of a token that counts neither in the loss nor in a metric; transformers' word for it."""


def model_inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments that a model is called with: the batch without its labels."""
    if isinstance(batch, Mapping):
        return (), {key: value for key, value in batch.items() if key != "labels"}
    return (batch[0],), {}


def to_logits(output: Any) -> Tensor:
    """The logits of what a model returned: a tensor, or the ``logits`` of a mapping or an object.

    Raises:
        QatkitError: it has none.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise QatkitError(f"model: it returned {type(output).__name__} without logits; return a tensor, or .logits")
    return found


def call(model: Callable[..., Any], batch: Any) -> Tensor:
    """The model's logits for a batch, in the shape that the model gives them."""
    args, kwargs = model_inputs(batch)
    return to_logits(model(*args, **kwargs))


def one_sample(batch: Any) -> Any:
    """The first sample of a batch, as a batch of one."""
    if isinstance(batch, Mapping):
        return {key: value[:1] for key, value in batch.items()}
    return [part[:1] for part in batch]


def mean_loss(model: Callable[..., Any], batch: Any) -> Tensor:
    """Cross-entropy of a batch, the mean over its samples or tokens, with its graph."""
    logits, labels = answers(call(model, batch), batch)
    return token_loss(logits, labels)[0] if is_text(batch) else F.cross_entropy(logits, labels)


def answers(logits: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits beside the labels that they are to give, a row per question: ``[rows, classes]`` and ``[rows]``.

    For a text a row is a place of the sequence, and its label the token after it, or `IGNORED`.

    Args:
        logits: What `call` returned.
        batch: What it was called with.

    Raises:
        QatkitError: the batch has no labels, or they do not fit the logits.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
        >>> rows, labels = answers(torch.zeros(1, 3, 10), batch)
        >>> rows.shape, labels.tolist()
        (torch.Size([2, 10]), [6, 7])
    """
    if not isinstance(batch, Mapping):
        return logits, batch[1]
    if "labels" not in batch:
        raise QatkitError(f"data: a batch has {sorted(batch)} and no 'labels'; add them: the input_ids of a text")
    labels: Tensor = batch["labels"]
    if logits.shape[:-1] != labels.shape:
        raise QatkitError(
            f"data: labels of shape {list(labels.shape)} do not fit logits of shape {list(logits.shape)}; give a label "
            "per token, or per sample"
        )
    if labels.dim() == 1:
        return logits, labels
    return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


def is_text(batch: Any) -> bool:
    """Whether a batch asks for the next token at every place of a text."""
    return isinstance(batch, Mapping) and getattr(batch.get("labels"), "ndim", 0) == 2


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the labels that count, in float32, and how many they are; 0 where none counts.

    Args:
        logits: ``[rows, vocabulary]``.
        labels: ``[rows]``, int64.
    """
    count = (labels != IGNORED).sum()
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / count.clamp(min=1), count


class Scores:
    """Metrics over any number of batches, every sample or token counted once: accuracy, and for texts the loss.

    Example:
        >>> scores = Scores()
        >>> scores.add(torch.eye(4), (None, torch.tensor([0, 1, 2, 0])))
        >>> scores.metrics()
        {'accuracy': 0.75}
    """

    def __init__(self) -> None:
        self.right = 0
        self.count = 0
        self.loss = 0.0
        self.text = False

    @torch.no_grad()
    def add(self, logits: Tensor, batch: Any) -> None:
        """Count one batch.

        Args:
            logits: What `call` returned.
            batch: What it was called with.
        """
        rows, labels = answers(logits, batch)
        if is_text(batch):
            self.text = True
            loss, count = token_loss(rows, labels)
            self.loss += float(loss) * int(count)
            self.count += int(count)
        else:
            self.count += labels.numel()
        self.right += int((rows.argmax(dim=-1) == labels).sum())

    def metrics(self) -> dict[str, float]:
        """``accuracy`` from 0 to 1; of texts also ``loss`` per token in nats, and ``perplexity``, its exponential."""
        accuracy = self.right / max(self.count, 1)
        if not self.text:
            return {"accuracy": accuracy}
        loss = self.loss / max(self.count, 1)
        return {"loss": loss, "perplexity": perplexity(loss), "accuracy": accuracy}


def perplexity(loss: float) -> float:
    """``exp(loss)``, of a loss in nats; from 700 on the largest that a number can hold is near, and it stays there."""
    return math.exp(min(loss, 700.0))


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """The metrics of a model over every sample or token once."""
    scores = Scores()
    for batch in batches:
        scores.add(call(model, batch), batch)
    return scores.metrics()
