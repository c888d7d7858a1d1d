"""The table of tasks that a model can be trained for, which data, validation, training, verification and report read.

A data factory declares its task by name, and so may a data module or a batch::

    def my_data(batch_size: int, seed: int) -> LightningDataModule: ...

    my_data.task = "classification"

If the data declares no task, a pair ``(inputs, labels)`` is treated as classification; a mapping is treated as text
classification if it has one label per sample, and causal language modeling otherwise.
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
    """A task: how a model is called, how its answers are scored, and the words that report the result."""

    name: str
    """The name that the data declares."""
    description: str
    """One-line description."""
    answers: str
    """``module:function`` of ``(outputs, batch) -> (rows, labels)``; their shapes depend on `kind`."""
    metrics: tuple[str, ...]
    """Names of rows of `qatkit.tasks.metrics.METRICS`, in the order in which they are reported."""
    metric: str
    """The metric that stages and exported files are compared by."""
    agreement: str
    """The noun for the answer that two models agree on: class, token or partner."""
    counted: str
    """The counted unit, in the plural."""
    kind: Kind = "classes"
    """"classes": one of several classes per row, ``[rows, classes]`` and ``[rows]``, trained with cross-entropy.
    "labels": binary labels, ``[rows, labels]`` twice, binary cross-entropy. "values": numbers, ``[values]``
    twice, mean squared error. "boxes": see `qatkit.tasks.detection`; the model computes the loss."""
    class_dim: int = -1
    """The class dimension of the outputs."""
    outputs: tuple[str, ...] = ()
    """Names of the outputs, if the model returns several; `call` joins them."""
    value_outputs: tuple[str, ...] = ()
    """Those of `outputs` that are values rather than classes; distillation compares them with ``mse``."""
    embeds: bool = False
    """The outputs are hidden states, which the batch's ``pooling`` pools into one embedding per row."""
    per_token: bool = False
    """The loss of an optimizer step is the mean over its tokens, not over its batches."""
    named_inputs: bool = False
    """Batches are mappings of named inputs, not pairs ``(inputs, labels)``."""
    next_token: bool = False
    """Each token is predicted from those before it, so sliding-window perplexity and text generation apply."""
    packages: tuple[str, ...] = ()
    """Import names of the optional packages that its loss and metrics need."""
    extra: str = ""
    """The optional dependency group that installs them."""
    free_dims: Mapping[int, str] = field(default_factory=dict, hash=False)
    """Names of the dimensions of an input, other than the batch, whose size may vary in an exported file: of tokens in
    a text, of pixels in an image."""

    def check_packages(self) -> None:
        """Reject the task if a package that it needs is missing.

        Raises:
            QatkitError: a package is missing; the error names the command that installs it.
        """
        check_packages(f"task '{self.name}'", self.packages, self.extra)

    @property
    def compared(self) -> str:
        """The kind of the outputs that distillation compares: that of the rows, or "embeddings"."""
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
            description="numbers of any shape per sample, forecasts included",
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
            description="boxes with a class each, by a transformers model that computes its own loss",
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
            description="the partner of each text among all partners of its batch, by cosine similarity of embeddings",
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
