"""The table of training tasks, shared by data, validation, training, verification and report.

A data factory declares its task by name; a data module or a batch may also do so::

    def my_data(batch_size: int, seed: int) -> LightningDataModule: ...

    my_data.task = "classification"

If the data does not declare a task, a pair ``(inputs, labels)`` is treated as classification; a mapping is treated as
text classification if it has one label per sample, and causal language modeling otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qatkit.common.packages import check_packages
from qatkit.common.tables import Table

Kind = Literal["classes", "labels", "values", "boxes"]


@dataclass(frozen=True)
class Task:
    """A task: how a model is called, how its predictions are scored, and the terms used in reports."""

    name: str
    """The name that the data declares."""
    description: str
    """One-line description."""
    answers: str
    """``module:function`` with the signature ``(outputs, batch) -> (rows, labels)``; the shapes depend on `kind`."""
    metrics: tuple[str, ...]
    """Names of rows of `qatkit.tasks.metrics.METRICS`, in the order in which they are reported."""
    metric: str
    """The metric used to compare stages and exported files."""
    agreement: str
    """The noun for a prediction on which two models agree: class, token or partner."""
    counted: str
    """The plural noun for the scored units."""
    kind: Kind = "classes"
    """"classes": one class per row, with outputs ``[rows, classes]``, labels ``[rows]`` and cross-entropy. "labels":
    binary labels, with outputs and labels ``[rows, labels]`` and binary cross-entropy. "values": numbers, with outputs
    and labels ``[values]`` and mean squared error. "boxes": labeled boxes, for which the model computes the loss; see
    `qatkit.tasks.detection`.
    """
    class_dim: int = -1
    """The class dimension of the outputs."""
    outputs: tuple[str, ...] = ()
    """Names of the outputs if the model returns more than one; `call` combines them."""
    value_outputs: tuple[str, ...] = ()
    """The elements of `outputs` that are values rather than classes; distillation compares them with ``mse``."""
    embeds: bool = False
    """Whether the outputs are hidden states, which are pooled into one embedding per row with the batch's ``pooling``.
    """
    per_token: bool = False
    """Whether the loss of an optimizer step is the mean over its tokens rather than over its batches."""
    named_inputs: bool = False
    """Whether batches are mappings of named inputs rather than pairs ``(inputs, labels)``."""
    next_token: bool = False
    """Whether each token is predicted from the preceding tokens, so that sliding-window perplexity and text generation
    apply.
    """
    packages: tuple[str, ...] = ()
    """Import names of the optional packages that the task's loss and metrics need."""
    extra: str = ""
    """The optional dependency group that installs these packages."""
    free_dims: Mapping[int, str] = field(default_factory=dict, hash=False)
    """Names of the input dimensions, other than the batch dimension, that may be dynamic in an exported file: the
    tokens of a text or the pixels of an image.
    """

    def check_packages(self) -> None:
        """Raise an error if a package that the task needs is missing.

        Raises:
            QatkitError: a package is missing; the error includes the command that installs it.
        """
        check_packages(f"task '{self.name}'", self.packages, self.extra)

    @property
    def compared(self) -> str:
        """The kind of outputs that distillation compares: "embeddings", or the same as `kind`."""
        return "embeddings" if self.embeds else "classes" if self.kind == "boxes" else self.kind


_TEXT = {1: "sequence"}

TASKS: Table[Task] = Table(
    "task",
    [
        Task(
            name="classification",
            description="one class per sample, from a pair (inputs, labels)",
            answers="qatkit.tasks.classification:answers",
            metrics=("loss", "accuracy"),
            metric="accuracy",
            agreement="class",
            counted="test samples",
        ),
        Task(
            name="multilabel",
            description="any number of binary labels per sample",
            answers="qatkit.tasks.multilabel:answers",
            metrics=("loss", "accuracy", "f1"),
            metric="f1",
            agreement="answer",
            counted="test labels",
            kind="labels",
        ),
        Task(
            name="regression",
            description="real values of any shape per sample, including forecasts",
            answers="qatkit.tasks.regression:answers",
            metrics=("loss", "rmse", "mae"),
            metric="rmse",
            agreement="value (within 1%)",
            counted="test values",
            kind="values",
        ),
        Task(
            name="segmentation",
            description="one class per pixel; dimension 1 of the logits is the class dimension",
            answers="qatkit.tasks.segmentation:answers",
            metrics=("loss", "accuracy", "iou"),
            metric="iou",
            agreement="class",
            counted="test pixels",
            class_dim=1,
            free_dims={2: "height", 3: "width"},
        ),
        Task(
            name="detection",
            description="boxes with class labels, from a transformers model that computes its own loss",
            answers="qatkit.tasks.detection:answers",
            metrics=("map",),
            metric="map",
            agreement="class and box (within 1%)",
            counted="predicted boxes",
            kind="boxes",
            packages=("pycocotools", "scipy"),
            extra="detection",
            outputs=("logits", "pred_boxes"),
            value_outputs=("pred_boxes",),
            named_inputs=True,
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
            free_dims=_TEXT,
        ),
        Task(
            name="token_classification",
            description="one class per token of a text",
            answers="qatkit.tasks.token_classification:answers",
            metrics=("loss", "accuracy", "f1"),
            metric="f1",
            agreement="class",
            counted="test tokens",
            per_token=True,
            named_inputs=True,
            free_dims=_TEXT,
        ),
        Task(
            name="question_answering",
            description="the first and last token of the answer in a text",
            answers="qatkit.tasks.question_answering:answers",
            metrics=("loss", "accuracy"),
            metric="accuracy",
            agreement="position",
            counted="test answer boundaries",
            named_inputs=True,
            free_dims=_TEXT,
            outputs=("start_logits", "end_logits"),
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
            free_dims=_TEXT,
        ),
        Task(
            name="seq2seq",
            description="each token of an output text, from an input text and the preceding output tokens",
            answers="qatkit.tasks.seq2seq:answers",
            metrics=("loss", "perplexity", "accuracy"),
            metric="perplexity",
            agreement="token",
            counted="test tokens",
            per_token=True,
            named_inputs=True,
            free_dims=_TEXT,
        ),
        Task(
            name="masked",
            description="the masked tokens of a text",
            answers="qatkit.tasks.masked:answers",
            metrics=("loss", "perplexity", "accuracy"),
            metric="perplexity",
            agreement="masked token",
            counted="masked test tokens",
            per_token=True,
            named_inputs=True,
            free_dims=_TEXT,
        ),
        Task(
            name="pairs",
            description="the partner of each text among all candidates in its batch, by cosine similarity of "
            "embeddings",
            answers="qatkit.tasks.pairs:answers",
            metrics=("loss", "accuracy"),
            metric="accuracy",
            agreement="partner",
            counted="test pairs",
            embeds=True,
            named_inputs=True,
            free_dims=_TEXT,
        ),
    ],
)


def declared_task(data: object, key: str = "data") -> Task | None:
    """Return the task that a data factory or data module declares; None if it does not declare a task.

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
    """Return the task that a batch declares, or else the task that its data declares, or else the default.

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
