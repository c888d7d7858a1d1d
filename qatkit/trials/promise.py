"""The evidence of a search: a file in its runtime beside the dense model, on data that the search never saw."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qatkit.errors import QatkitError
from qatkit.export.judges import TaskJudge
from qatkit.run.exports import Exported
from qatkit.run.folder import Run
from qatkit.tasks import answers, call, task_of
from qatkit.tasks.metrics import METRICS
from qatkit.tasks.table import Task

_CLASSES = 1000
"""The largest number of classes of which the worst is named."""
_FEWEST = 10
"""Classes with fewer samples are not compared."""


@dataclass(frozen=True)
class Promise:
    """A file compared with the dense model on the test split."""

    metric: str
    dense: float
    """The dense model's metric."""
    found: float
    """The file's metric, in its runtime."""
    lost: float
    """The loss of the metric; see `Metric.lost`."""
    interval: tuple[float, float] | None
    """The 95% interval of the loss, from the paired differences of all samples; None if it is not known for the metric.
    """
    flipped: float
    """Fraction of predictions that differ from those of the dense model."""
    samples: int
    worst: tuple[int, float] | None = None
    """The class that lost most accuracy, and its loss; None unless every sample has one class."""


@torch.no_grad()
def compare(run: Run, stage: str, exported: Exported, batches: Iterable[Any], task: Task | None) -> Promise:
    """Run an exported file and the dense model on the same batches.

    Args:
        run: The run.
        stage: The stage of the dense model.
        exported: The file.
        batches: Batches of the test split.
        task: The task that the data declares.

    Raises:
        QatkitError: the runtime cannot load the file.
    """
    dense = run.load_model(stage, quantizers=False).eval()
    row = exported.format
    file = row.call("read_back", run.load_model(exported.stage).eval(), exported.path, None).runtime
    if file is None:
        raise QatkitError(f"{row.runtime} cannot load it", key=str(exported.path), advice="run `qatkit verify`")
    judges, pairs = (TaskJudge(task), TaskJudge(task)), list[tuple[Tensor, Tensor, Tensor]]()
    same = 0
    for batch in batches:
        outputs = [call(model, batch) for model in (dense, file)]
        for judge, output in zip(judges, outputs, strict=True):
            judge.add(output, batch)
        same += judges[0].agreements(outputs[0], outputs[1], batch)
        if task_of(batch, task).kind == "classes":
            pairs.append(_classes(outputs, batch, task))
    own = task_of(batch, task)
    metric, values = METRICS[own.metric], [judge.value() for judge in judges]
    return Promise(
        metric=metric.name,
        dense=values[0],
        found=values[1],
        lost=metric.lost(*values),
        interval=_interval(metric.name, pairs),
        flipped=1 - same / judges[0].count,
        samples=judges[0].count,
        worst=_worst(pairs) if not own.per_token else None,
    )


def _classes(outputs: list[Tensor], batch: Any, task: Task | None) -> tuple[Tensor, Tensor, Tensor]:
    """Labels ``[samples]``, and correctness and loss of both models ``[2, samples]``."""
    correct, losses = [], []
    for output in outputs:
        rows, labels = answers(output, batch, task)
        rows, labels = rows[labels >= 0], labels[labels >= 0]  # without ignored ones
        correct.append((rows.argmax(-1) == labels).double())
        losses.append(F.cross_entropy(rows.double(), labels, reduction="none"))
    return labels, torch.stack(correct), torch.stack(losses)


def _interval(metric: str, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float] | None:
    if not pairs or metric not in ("accuracy", "perplexity"):
        return None
    _, correct, losses = (torch.cat(parts, -1) for parts in zip(*pairs, strict=True))
    difference = correct[0] - correct[1] if metric == "accuracy" else losses[1] - losses[0]
    half = NormalDist().inv_cdf(0.975) * float(difference.std()) / len(difference) ** 0.5
    low, high = float(difference.mean()) - half, float(difference.mean()) + half
    if metric == "accuracy":
        return low, high
    return float(torch.tensor(low).expm1()), float(torch.tensor(high).expm1())  # perplexities relative to each other


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
