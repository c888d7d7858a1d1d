"""Progress display of a stage: a bar on a terminal, or a line every half minute in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import override

from qatkit.tasks.metrics import METRICS

Style = Literal["bar", "lines"]
"""A progress bar on standard error, or lines on standard output."""
EVERY = 10
"""Steps between reads of the metrics; each read synchronizes with the device."""
INTERVAL = 30.0
"""Seconds between lines."""


def progress_callbacks(styles: Sequence[Style], stage: str, position: int, stages: int) -> list[Callback]:
    """Return callbacks that show the progress of a stage on rank 0.

    Args:
        styles: How to show the progress.
        stage: Name of the stage.
        position: Position of the stage in the recipe, starting at 1.
        stages: Number of stages in the recipe.
    """
    title = f"stage {stage} ({position} of {stages})"
    kinds: dict[Style, type[ProgressBar | ProgressLines]] = {"bar": ProgressBar, "lines": ProgressLines}
    return [kinds[style](title) for style in styles]


class ProgressBar(Callback):
    """A progress bar over the steps of a stage, with metrics and the time left; it disappears when the stage ends.

    Args:
        title: Text before the bar.
    """

    def __init__(self, title: str) -> None:
        self._title = title
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
        task = self._progress.task_ids[0]
        self._progress.update(task, completed=trainer.global_step, metrics="  ".join(_metrics(trainer)))

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


class ProgressLines(Callback):
    """Print the step, metrics and time left about every half minute.

    Args:
        title: Text at the beginning of each line.
        interval: Seconds between lines.
    """

    def __init__(self, title: str, interval: float = INTERVAL) -> None:
        self._title = title
        self._interval = interval
        self._first_step = 0
        self._started = self._printed = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step
        self._started = self._printed = time.monotonic()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, step = time.monotonic(), trainer.global_step
        if not trainer.is_global_zero or now - self._printed < self._interval or step == self._first_step:
            return
        self._printed = now
        left = (now - self._started) / (step - self._first_step) * (trainer.max_steps - step)
        parts = [f"step {step} of {trainer.max_steps}", *_metrics(trainer), f"{_duration(left)} left"]
        sys.stdout.write(f"{self._title}: {', '.join(parts)}\n")
        sys.stdout.flush()


def _metrics(trainer: Trainer) -> list[str]:
    keys = ["train/loss", *(f"val/{name}" for name in METRICS if name != "loss")]
    values = {key: trainer.callback_metrics.get(key) for key in keys}
    return [f"{key} {float(value):.4f}" for key, value in values.items() if value is not None]


def _duration(seconds: float) -> str:
    """A duration in the two largest units.

    Example:
        >>> _duration(40.2), _duration(150), _duration(7500)
        ('40 s', '2 min 30 s', '2 h 5 min')
    """
    total = round(seconds)
    hours, minutes = total // 3600, total // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {total % 60} s" if minutes else f"{total} s"
