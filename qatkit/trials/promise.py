"""The evidence of a search: a model or a file in its runtime beside the dense model, on one split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.errors import QatkitError
from qatkit.export.format_row import ExportFormat
from qatkit.export.judges import TaskJudge
from qatkit.tasks import answers, call, task_of
from qatkit.tasks.metrics import METRICS
from qatkit.tasks.table import Task
from qatkit.trials.bootstrap import Bootstrap

ONE_SIDED = NormalDist().inv_cdf(0.95)
"""Standard errors between a mean and the value that is exceeded with a probability of 5%."""
_MEANS = ("accuracy", "perplexity")
"""Metrics whose interval follows from the paired differences of all samples."""
_CLASSES = 1000
"""The largest number of classes of which the worst is named."""
_FEWEST = 10
"""Classes with fewer samples are not compared."""


@dataclass(frozen=True)
class Promise:
    """A model or a file compared with the dense model on a split."""

    metric: str
    dense: float
    """The dense model's metric."""
    found: float
    """The metric of the other model, in its runtime if it is a file."""
    lost: float
    """The loss of the metric; see `Metric.lost`."""
    interval: tuple[float, float] | None
    """The 95% interval of the loss: from the paired differences of all samples for accuracy and perplexity, and from a
    bootstrap over samples for other metrics; None with a single sample.
    """
    bound: float
    """The loss that another split of the same size exceeds with a probability of 5%, where an improvement counts as no
    change; equal to `lost` if it is not known for the metric.
    """
    flipped: float
    """Fraction of predictions that differ from those of the dense model."""
    samples: int
    worst: tuple[int, float] | None = None
    """The class that lost most accuracy, and its loss; None unless every sample has one class."""


@torch.no_grad()
def compare(dense: Callable[..., Any], found: Callable[..., Any], batches: Iterable[Any], task: Task | None) -> Promise:
    """Run two models on the same batches.

    Args:
        dense: The dense model, in eval mode.
        found: The other model, or a file in its runtime, with the same call signature.
        batches: Batches of a split.
        task: The task that the data declares.
    """
    judges, pairs = (TaskJudge(task), TaskJudge(task)), list[tuple[Tensor, Tensor, Tensor]]()
    same, own, draws = 0, task, Bootstrap(task)
    for batch in batches:
        outputs = [call(model, batch) for model in (dense, found)]
        for judge, output in zip(judges, outputs, strict=True):
            judge.add(output, batch)
        same += judges[0].agreements(outputs[0], outputs[1], batch)
        own = task_of(batch, task)
        if own.kind == "classes":
            pairs.append(_classes(outputs, batch, task))
        if own.metric not in _MEANS:
            draws.add(outputs, batch)
    assert own is not None
    metric, values = METRICS[own.metric], [judge.value() for judge in judges]
    lost = metric.lost(*values)
    mean_and_error = _difference(metric.name, pairs)
    return Promise(
        metric=metric.name,
        dense=values[0],
        found=values[1],
        lost=lost,
        interval=draws.interval() if mean_and_error is None else _interval(metric.name, mean_and_error),
        bound=lost if mean_and_error is None else _bound(metric.name, mean_and_error),
        flipped=1 - same / judges[0].count,
        samples=judges[0].count,
        worst=_worst(pairs) if not own.per_token else None,
    )


def runtime_of(row: ExportFormat, model: nn.Module, path: Path) -> Callable[..., Any]:
    """Load an exported file in its runtime, with the call signature of the model.

    Args:
        row: The format.
        model: The exported model, in eval mode.
        path: The file.

    Raises:
        QatkitError: the runtime cannot load the file.
    """
    runtime: Callable[..., Any] | None = row.call("read_back", model, path, None).runtime
    if runtime is None:
        raise QatkitError(f"{row.runtime} cannot load it", key=str(path), advice="run `qatkit verify`")
    return runtime


def split_batches(data: LightningDataModule, split: str) -> Any:
    """Return the loader of a split on which a search relies.

    Args:
        data: The data, set up.
        split: "validation" or "test".

    Raises:
        QatkitError: the data has no such split, or it is empty.
    """
    try:
        loader = data.val_dataloader() if split == "validation" else data.test_dataloader()
    except MisconfigurationException:  # not overridden
        loader = None
    if isinstance(loader, list | tuple | dict):
        raise QatkitError(
            f"the data has {len(loader)} {split} loaders, but a search decides by one metric", key="data",
            advice="return a single loader",
        )  # fmt: skip
    if loader is None or not any(True for _ in islice(iter(loader), 1)):
        use = "decides by the validation split" if split == "validation" else "measures its result on the test split"
        name = split.removesuffix("idation")
        raise QatkitError(
            f"a search {use}, but the data has none", key="data",
            advice=f"add a split, such as data.args.{name}_fraction: 0.1, or {name}_dataloader() in your data module",
        )  # fmt: skip
    return loader


def _classes(outputs: list[Tensor], batch: Any, task: Task | None) -> tuple[Tensor, Tensor, Tensor]:
    """Labels ``[samples]``, and correctness and loss of both models ``[2, samples]``."""
    correct, losses = [], []
    for output in outputs:
        rows, labels = answers(output, batch, task)
        rows, labels = rows[labels >= 0], labels[labels >= 0]  # without ignored ones
        correct.append((rows.argmax(-1) == labels).double())
        losses.append(F.cross_entropy(rows.double(), labels, reduction="none"))
    return labels, torch.stack(correct), torch.stack(losses)


def _difference(metric: str, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float] | None:
    """Mean of the paired differences of all samples, and its standard error; None if a metric is no mean of samples."""
    if not pairs or metric not in _MEANS:
        return None
    _, correct, losses = (torch.cat(parts, -1) for parts in zip(*pairs, strict=True))
    difference = correct[0] - correct[1] if metric == "accuracy" else losses[1] - losses[0]
    return float(difference.mean()), float(difference.std()) / len(difference) ** 0.5


def _interval(metric: str, found: tuple[float, float]) -> tuple[float, float]:
    (mean, error), half = found, NormalDist().inv_cdf(0.975)
    return _loss(metric, mean - half * error), _loss(metric, mean + half * error)


def _bound(metric: str, found: tuple[float, float]) -> float:
    """The means of two splits of the same size differ by the square root of two standard errors.

    Compression rarely improves a model, so an improvement is mostly luck, which another split does not share.
    """
    mean, error = found
    return _loss(metric, max(mean, 0.0) + ONE_SIDED * math.sqrt(2) * error)


def _loss(metric: str, difference: float) -> float:
    """Perplexities are relative to each other, and their logarithms are means."""
    return math.expm1(difference) if metric == "perplexity" else difference


def _worst(pairs: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[int, float] | None:
    if not pairs:
        return None
    labels, correct, _ = (torch.cat(parts, -1) for parts in zip(*pairs, strict=True))
    if int(labels.max()) >= _CLASSES:
        return None
    counts = torch.bincount(labels)
    lost = torch.bincount(labels, correct[0] - correct[1]) / counts.clamp(min=1)
    lost[counts < _FEWEST] = -1.0
    worst = int(lost.argmax())
    return (worst, float(lost[worst])) if counts[worst] >= _FEWEST else None
