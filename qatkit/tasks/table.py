"""The table of tasks that a model can be trained for, which data, validation, training, verification and report read.

A data factory declares its task by name, and so may a data module or a batch::

    def my_data(batch_size: int, seed: int) -> LightningDataModule: ...

    my_data.task = "classification"

Data that declares nothing keeps working: a pair ``(inputs, labels)`` is a classification; a mapping is text
classification if it has one label per sample, and causal language modeling otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qatkit.common.tables import Table

MetricName = Literal["loss", "perplexity", "accuracy", "f1"]

HIGHER_IS_BETTER: dict[MetricName, bool] = {"loss": False, "perplexity": False, "accuracy": True, "f1": True}
"""The direction of every metric."""


@dataclass(frozen=True)
class Task:
    """A task: how a model is called, how its answers are scored, and the terms for it."""

    name: str
    """The name that the data declares."""
    description: str
    """One-line description."""
    answers: str
    """``module:function`` of ``(logits, batch) -> (rows, labels)``: ``[rows, classes]`` and ``[rows]``."""
    metrics: tuple[MetricName, ...]
    """Metrics of validation and test, in the order in which they are reported."""
    metric: MetricName
    """The metric that stages and exported files are compared by."""
    agreement: str
    """The noun for the answer that two models agree on: class, token or partner."""
    counted: str
    """The counted unit, in the plural."""
    per_token: bool = False
    """The loss of an optimizer step is the mean over its tokens, not over its batches."""
    named_inputs: bool = False
    """Batches are mappings of named inputs, not pairs ``(inputs, labels)``."""
    next_token: bool = False
    """Each token is predicted from those before it, so sliding-window perplexity and text generation apply."""


TASKS: Table[Task] = Table(
    "task",
    [
        Task(
            name="classification",
            description="one class per sample, from a pair (inputs, labels)",
            answers="qatkit.tasks.classification:answers",
            metrics=("accuracy",),
            metric="accuracy",
            agreement="class",
            counted="test samples",
        ),
        Task(
            name="text_classification",
            description="one class per text",
            answers="qatkit.tasks.text_classification:answers",
            metrics=("loss", "accuracy", "f1"),
            metric="accuracy",
            agreement="class",
            counted="test texts",
            named_inputs=True,
        ),
        Task(
            name="causal",
            description="the next token at each position of a text",
            answers="qatkit.tasks.causal:answers",
            metrics=("loss", "perplexity", "accuracy"),
            metric="perplexity",
            agreement="next token",
            counted="test tokens",
            per_token=True,
            next_token=True,
            named_inputs=True,
        ),
        Task(
            name="masked",
            description="the masked tokens of a text",
            answers="qatkit.tasks.masked:answers",
            metrics=("loss", "perplexity", "accuracy"),
            metric="perplexity",
            agreement="masked token",
            counted="hidden test tokens",
            per_token=True,
            named_inputs=True,
        ),
        Task(
            name="pairs",
            description="the partner of each text among all partners of its batch, by cosine similarity of embeddings",
            answers="qatkit.tasks.pairs:answers",
            metrics=("loss", "accuracy"),
            metric="accuracy",
            agreement="partner",
            counted="test pairs",
            named_inputs=True,
        ),
    ],
)


def declared_task(data: object, key: str = "data") -> Task | None:
    """Return the task that a data factory or a data module declares; None if it declares none.

    Args:
        data: A data factory, a data module or anything else with an attribute ``task``.
        key: Name of `data` in errors.

    Raises:
        QatkitError: the declared name is unknown.

    Example:
        >>> def pictures(): ...
        >>> declared_task(pictures)
        >>> pictures.task = "classification"
        >>> declared_task(pictures).metric
        'accuracy'
    """
    name = getattr(data, "task", None)
    return TASKS.row(name, key) if isinstance(name, str) else None


def task_of(batch: Any, declared: Task | None = None) -> Task:
    """Return the task of a batch: the one it declares, or the one its data declares, or the default.

    Args:
        batch: A pair ``(inputs, labels)``, or a mapping in the format of transformers models.
        declared: The task that the data module declares.

    Raises:
        QatkitError: the name under ``batch["task"]`` is unknown.

    Example:
        >>> task_of((None, None)).name, task_of({"labels": None}).name, task_of({"task": "masked"}).name
        ('classification', 'causal', 'masked')
    """
    if isinstance(batch, Mapping) and "task" in batch:
        return TASKS.row(str(batch["task"]), "batch.task")
    if declared is not None:
        return declared
    if not isinstance(batch, Mapping):
        return TASKS["classification"]
    return TASKS["text_classification" if getattr(batch.get("labels"), "ndim", 0) == 1 else "causal"]
