"""What a batch asks of a model: a class per sample, a token at every place of a text, or which texts belong together.

A pair ``(inputs, labels)`` is a classification. A mapping, as models of transformers take it, asks

- with a label per sample ``[batch]`` for a class;
- with a label per token ``[batch, tokens]`` for the next token, or, where it holds ``"task": "masked"``, for the one at
  the same place;
- with ``"task": "pairs"`` for embeddings: the first half of the rows are texts, the second half their partners in the
  same order, and each text is to be nearer to its own partner than to the others.
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

OURS = ("labels", "task", "pooling")
"""Keys of a batch that are not for the model."""
TEMPERATURE = 0.05
"""Cosine similarities of pairs are divided by it; Gao et al. (2021), "SimCSE", section 3."""


def model_inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments that a model is called with: the batch without its labels."""
    if isinstance(batch, Mapping):
        return (), {key: value for key, value in batch.items() if key not in OURS}
    return (batch[0],), {}


def to_logits(output: Any) -> Tensor:
    """The logits of what a model returned: a tensor, or the ``logits`` of a mapping or an object.

    Of an encoder without a head its last hidden states.

    Raises:
        QatkitError: it has none.
    """
    found = output
    for name in ("last_hidden_state", "logits"):
        found = output.get(name, found) if isinstance(output, Mapping) else getattr(output, name, found)
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

    For a text a row is a place of the sequence, and its label the token after it, or `IGNORED`. For pairs a row is a
    text, and holds its similarity to every partner.

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
    if batch.get("task") == "pairs":
        first, second = F.normalize(pooled(logits, batch), dim=-1).chunk(2)
        return first @ second.T / TEMPERATURE, labels
    if logits.shape[:-1] != labels.shape:
        raise QatkitError(
            f"data: labels of shape {list(labels.shape)} do not fit logits of shape {list(logits.shape)}; give a label "
            "per token, or per sample"
        )
    if labels.dim() == 1:
        return logits, labels
    if batch.get("task") == "masked":
        return logits.flatten(0, 1), labels.flatten()
    return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


def pooled(hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """One embedding per text out of one per token, in float32: ``[rows, width]``.

    Args:
        hidden: ``[rows, tokens, width]``.
        batch: Its "attention_mask" says which tokens are of the text, its "pooling" whether their "mean", the first
            ("cls") or the last of them ("last") stands for it.
    """
    mask: Tensor = batch["attention_mask"]
    if batch["pooling"] == "mean":
        weights = mask.unsqueeze(-1).float()
        return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
    place = mask.sum(1) - 1 if batch["pooling"] == "last" else torch.zeros_like(mask[:, 0])
    return hidden.float()[torch.arange(len(hidden), device=hidden.device), place]


def is_text(batch: Any) -> bool:
    """Whether a batch asks for tokens at the places of a text."""
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
    """Metrics over any number of batches, every sample or token counted once.

    Accuracy; for mappings the loss too; for texts its exponential, the perplexity; for classes of texts F1.

    Example:
        >>> scores = Scores()
        >>> scores.add(torch.eye(4), (None, torch.tensor([0, 1, 2, 0])))
        >>> scores.metrics()
        {'accuracy': 0.75}
    """

    def __init__(self) -> None:
        self.right = 0.0
        self.count = 0
        self.loss = 0.0
        self.text = False
        self._has_loss = False
        self._classes: Tensor | None = None  # right, answered, true: [3, classes]

    @torch.no_grad()
    def add(self, logits: Tensor, batch: Any) -> None:
        """Count one batch.

        Args:
            logits: What `call` returned.
            batch: What it was called with.
        """
        rows, labels = answers(logits, batch)
        answered = rows.argmax(dim=-1)
        self.text = self.text or is_text(batch)
        self._has_loss = self._has_loss or isinstance(batch, Mapping)
        if self._has_loss:
            loss, counted = token_loss(rows, labels)
            self.loss += float(loss) * int(counted)
            self.count += int(counted)
        else:
            self.count += labels.numel()
        self.right += int((answered == labels).sum())
        if self._has_loss and not self.text and batch.get("task") != "pairs":
            true = labels[labels != IGNORED]
            groups = (labels[answered == labels], answered[labels != IGNORED], true)
            counts = torch.stack([torch.bincount(group, minlength=rows.shape[-1]) for group in groups]).double().cpu()
            self._classes = counts if self._classes is None else self._classes + counts

    def sums(self) -> Tensor:
        """Everything that was counted, to be added up over processes."""
        own = torch.tensor([self.loss, self.right, self.count], dtype=torch.float64)
        return own if self._classes is None else torch.cat([own, self._classes.flatten()])

    def replaced(self, sums: Tensor) -> Scores:
        """The scores that belong to the `sums` of all processes, or to their mean."""
        whole = Scores()
        whole.text, whole._has_loss = self.text, self._has_loss
        (whole.loss, whole.right, count), rest = sums[:3].tolist(), sums[3:].cpu()
        whole.count = count
        whole._classes = rest.view(3, -1) if self._classes is not None else None
        return whole

    def metrics(self) -> dict[str, float]:
        """``accuracy`` from 0 to 1; of mappings also ``loss`` per label in nats; of texts ``perplexity``.

        Of classes also ``f1``: the mean, over the classes that occur, of the harmonic mean of precision and recall.

        Raises:
            QatkitError: texts were counted, and none of their labels counts.
        """
        if self.text and self.count == 0:
            raise QatkitError(
                f"data: every label is {IGNORED}, so none counts; give labels to the tokens to be learned"
            )
        accuracy = self.right / (self.count or 1)
        if not self._has_loss:
            return {"accuracy": accuracy}
        loss = self.loss / (self.count or 1)
        if self.text:
            return {"loss": loss, "perplexity": perplexity(loss), "accuracy": accuracy}
        if self._classes is None:
            return {"loss": loss, "accuracy": accuracy}
        right, answered, true = self._classes
        occur = answered + true > 0
        return {"loss": loss, "accuracy": accuracy, "f1": float((2 * right / (answered + true))[occur].mean())}


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
