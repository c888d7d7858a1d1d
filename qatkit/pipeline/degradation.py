"""Warn about a stage that makes its model worse, by comparing the validation metric before and after training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from qatkit.callbacks.batches import as_training_does
from qatkit.errors import QatkitWarning
from qatkit.recipe import StageConfig
from qatkit.tasks import METRICS, Scores, Task, call

NOISE = 1.5
"""Accuracy and F1 must fall by more than this number, divided by the square root of the number of samples. This is at
least three standard errors for any accuracy.
"""
FACTOR = 1.05
"""Other metrics, such as loss, perplexity, RMSE and mean IoU, must worsen by more than this factor."""


@dataclass(frozen=True)
class Before:
    """The validation metric of a task before the first step of a stage."""

    metric: str
    value: float
    count: int
    """Number of samples, pixels or tokens on which the metric was measured."""

    def is_better_than(self, after: float) -> bool:
        """Return whether a later value is worse by more than noise.

        Example:
            >>> start = Before("accuracy", 0.80, count=180)
            >>> start.is_better_than(0.33), start.is_better_than(0.75)
            (True, False)
            >>> Before("perplexity", 10.0, count=180).is_better_than(10.6)
            True
        """
        metric = METRICS[self.metric]
        if metric.counts:
            return self.value - after > NOISE / math.sqrt(self.count)
        if metric.higher_is_better:
            return not after * FACTOR >= self.value  # NaN is worse too
        return not after <= self.value * FACTOR


class StartMetric(Callback):
    """Measure the validation metric after the stage's compression and before its first step.

    Compression lowers the accuracy and training should recover it, so the result of the previous stage would be the
    wrong reference. The random state is restored. A resumed stage keeps its original value.

    Args:
        task: The task that the data declares. By default, it is inferred from the batches.
    """

    def __init__(self, task: Task | None) -> None:
        self.task = task
        self.before: Before | None = None
        """None until it is measured, or if there is no validation data."""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.before is None else asdict(self.before)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = Before(**state_dict) if state_dict else None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is None:
            with isolate_rng():
                self.before = self._measure(trainer, pl_module)

    @torch.no_grad()
    def _measure(self, trainer: Trainer, module: LightningModule) -> Before | None:
        def logits_of(module: LightningModule, batch: Any) -> tuple[Tensor, Any]:
            return call(module, batch), batch

        forward = as_training_does(trainer, module, logits_of)
        scores, modes = Scores(self.task), {part: part.training for part in module.modules()}
        module.eval()
        try:
            for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]  # set by Lightning
                scores.add(*forward(batch))
        finally:
            for part, training in modes.items():
                part.training = training
        if scores.task is None or scores.count == 0:
            return None
        metric = scores.task.metric
        return Before(metric, scores.metrics()[metric], scores.count)


def start_metric(stage: StageConfig, task: Task | None) -> StartMetric | None:
    """Return the callback of a stage; None if nothing can be compared.

    There is no comparison for a stage that does not train, because it cannot make its model worse. There is none for a
    stage that prunes during training either, because it ends with more pruned weights than it begins with.
    """
    if stage.max_steps == 0 or (stage.prune is not None and not stage.prune.at_once):
        return None
    return StartMetric(task)


def warn_if_worse(name: str, before: Before | None, metrics: Mapping[str, float]) -> None:
    """Warn if the validation metric of a stage is worse at its end than at its start.

    Args:
        name: The stage name.
        before: The metric before the first step.
        metrics: The stage's final metrics, as in ``stage.json``.
    """
    if before is None or not before.is_better_than(after := metrics[f"val/{before.metric}"]):
        return
    moved = "fell" if METRICS[before.metric].higher_is_better else "rose"
    warnings.warn(
        f"stages.{name}: validation {before.metric} {moved} from {before.value:.4g} to {after:.4g} in this stage; use "
        "a smaller lr, a warmup or gradient_clip: 1.0",
        QatkitWarning,
        stacklevel=1,
    )
