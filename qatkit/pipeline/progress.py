"""The progress bar of a stage: one bar over its steps, with the metrics and the time left."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import override

EVERY = 10
"""Steps between two looks at the metrics: reading one waits for the device."""


class StageProgress(Callback):
    """Draws the bar on standard error, on the first process; it is gone when the stage ends.

    Args:
        stage: Name of the stage.
        position: Which stage of the recipe it is, from 1.
        stages: How many there are.
    """

    def __init__(self, stage: str, position: int, stages: int) -> None:
        self._title = f"stage {stage} ({position} of {stages})"
        self._progress: Progress | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
        )
        self._progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._progress.add_task(self._title, total=trainer.max_steps, completed=trainer.global_step, metrics="")
        self._progress.start()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._progress is None or (trainer.global_step % EVERY and trainer.global_step != trainer.max_steps):
            return
        shown = {key: trainer.callback_metrics.get(key) for key in ("train/loss", "val/perplexity", "val/accuracy")}
        metrics = "  ".join(f"{key} {float(value):.4f}" for key, value in shown.items() if value is not None)
        self._progress.update(self._progress.task_ids[0], completed=trainer.global_step, metrics=metrics)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
