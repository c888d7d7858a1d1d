"""The interval of the loss of a metric that is no mean over samples, such as F1, IOU and mAP.

Samples are drawn with replacement, and both models see the same draws, so that the interval is that of paired
differences (Efron, 1979, https://doi.org/10.1214/aos/1176344552).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qatkit.common.tables import implementation
from qatkit.tasks import answers, task_of
from qatkit.tasks.metrics import METRICS
from qatkit.tasks.table import Task

if TYPE_CHECKING:
    from torchmetrics import Metric

DRAWS = 1000
DRAWS_OF_LISTS = 200
"""Draws of metrics that are computed from all predictions, such as mAP, which takes much longer."""


class Bootstrap:
    """Collects the predictions of two models per sample: an image, a text or a row.

    Args:
        task: The task that the data declares.
    """

    def __init__(self, task: Task | None) -> None:
        self._declared = task
        self._name = ""
        self._metric: Metric | None = None
        self._samples: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])
        self._states: tuple[list[dict[str, Tensor]], ...] = ([], [])

    def add(self, outputs: Sequence[Tensor], batch: Any) -> None:
        """Add the outputs of the dense and of the other model for one batch."""
        task = task_of(batch, self._declared)
        for model, output in enumerate(outputs):
            rows, labels = answers(output, batch, self._declared)
            if self._metric is None:
                self._name = task.metric
                self._metric = implementation(METRICS[task.metric].compute)(task, rows)
            labels = labels if task.kind in ("values", "boxes") else labels.long()
            groups = len(output) if len(rows) % len(output) == 0 else len(rows)
            for sample in zip(rows.float().tensor_split(groups), labels.tensor_split(groups), strict=True):
                self._add(model, sample)

    def _add(self, model: int, sample: tuple[Tensor, Tensor]) -> None:
        metric = self._metric
        assert metric is not None
        metric.reset()
        metric.update(*sample)
        states = metric.metric_state
        if any(isinstance(state, list) for state in states.values()):
            self._samples[model].append(sample)
        else:  # sums over samples, which are kept instead of the predictions
            self._states[model].append({name: state for name, state in states.items() if isinstance(state, Tensor)})
            if not self._samples[model]:
                self._samples[model].append(sample)

    def interval(self) -> tuple[float, float] | None:
        """Return the 95% interval of the loss; None with fewer than two samples."""
        sums = [
            {name: torch.stack([state[name] for state in states]).double() for name in states[0]}
            for states in self._states
            if states
        ]
        count = len(self._states[0]) if sums else len(self._samples[0])
        if count < 2:
            return None
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(DRAWS if sums else DRAWS_OF_LISTS):
            drawn = torch.randint(count, (count,), generator=generator)
            values = [self._of_sums(state, drawn) for state in sums] or [self._of_all(each, drawn) for each in (0, 1)]
            found.append(METRICS[self._name].lost(*values))
        parts = torch.tensor([0.025, 0.975], dtype=torch.float64)
        low, high = torch.tensor(found, dtype=torch.float64).nanquantile(parts).tolist()
        return low, high

    def _of_sums(self, sums: dict[str, Tensor], drawn: Tensor) -> float:
        metric = self._metric
        assert metric is not None
        metric.reset()
        metric.update(*self._samples[0][0])  # so that it is not empty; its states are replaced
        for name, state in sums.items():
            like = getattr(metric, name)
            setattr(metric, name, state[drawn].sum(0).to(like.dtype))
        return float(metric.compute())

    def _of_all(self, model: int, drawn: Tensor) -> float:
        metric = self._metric
        assert metric is not None
        metric.reset()
        for index in drawn.tolist():
            metric.update(*self._samples[model][index])
        return float(metric.compute())
