"""Monitor compression during training: log a few curves, and a table with one row per layer."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import fsspec
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from qatkit.callbacks.distillation import KnowledgeDistillation
from torch import Tensor, nn
from typing_extensions import override

from qatkit.errors import QatkitError
from qatkit.quantization.monitoring import BINS, NUMBERS, LayerWatch, observed_layers, weight_of
from qatkit.quantization.prepare import QATWeight

COMPARISONS = 10
"""Number of student-teacher comparisons between observations."""


@dataclass(frozen=True)
class MonitorRow:
    """The most recent observation of one layer; None marks values that do not exist or are not yet available."""

    name: str
    weights: int
    weight_bits: int
    """32 if weights are not quantized."""
    activation_bits: int
    weight_error: float
    """``||fake_quantize(w) - w|| / ||w||``."""
    clip_rate: float
    """Fraction of weights outside the range of codes."""
    sparsity: float
    """Fraction of weights that are zero after quantization."""
    oscillation: float | None
    """Fraction of codes that have reversed direction since the previous observation."""
    weight_scale_drift: float | None
    """Relative change of the mean weight scale since the start of the stage."""
    input_scale_drift: float | None
    """Relative change of the static input scale since the start of the stage."""


class CompressionMonitor(Callback):
    """Observe the quantized layers of any LightningModule, and log summaries over all layers.

    Observations are made at the start, every `every` optimizer steps, and at the end. All but the first log:

    - ``quant/weight_error``, ``quant/clip_rate``, ``quant/sparsity``: means over weights;
    - ``quant/scale_drift``: mean relative change of the scales that moved, since the start;
    - ``quant/oscillation``: fraction of codes that reversed direction, from the third observation on; see `LayerWatch`;
    - ``distill/teacher_agreement``, with `KnowledgeDistillation`: fraction of training samples (tokens of a language
      model) on which student and teacher agree, measured in 10 of the steps since the previous observation.

    `table` contains the layers of the last observation. At the end of training, it is logged next to the metrics: as
    ``layers.csv`` by CSVLogger, as a table by WandbLogger, and as text by TensorBoardLogger. For a module without
    quantized layers, the table contains only the sparsity of its weights, and no curves are logged.

    Training synchronizes with the device once per observation. In a process group all processes observe, and samples
    are counted across all processes. A checkpoint contains the mean of each scale at the start of training; the
    oscillation measurement restarts after a resume.

    Args:
        every: Number of optimizer steps between observations, at least 1.

    Raises:
        QatkitError: `every` is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from qatkit.callbacks import CompressionMonitor
        >>> trainer = Trainer(callbacks=[CompressionMonitor()])
    """

    def __init__(self, every: int = 100) -> None:
        if every < 1:
            raise QatkitError(f"{every} is out of range", key="every", advice="use a positive integer")
        self.every = every
        self.table: list[MonitorRow] = []
        """The last observation of each layer."""
        self.codes: list[int] = []
        """Histogram of the codes of all layers at the end of training, in 16 bins over each layer's range of codes."""
        self._start: dict[str, list[float | None]] = {}
        self._forget()

    def _forget(self) -> None:
        self.table, self.codes, self._start = [], [], {}
        self._watches: dict[str, LayerWatch] = {}
        self._seen = 0
        self._agreed: Tensor | None = None
        self._compared = 0
        self._teachers: list[KnowledgeDistillation] = []

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = dict(state_dict.get("start", {}))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._forget()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = trainer.global_step
        self._observe(trainer, pl_module)
        self._teachers = [other for other in _callbacks(trainer) if isinstance(other, KnowledgeDistillation)]

        def compare(agreement: Callable[[], Tensor]) -> None:
            if trainer.global_step % max(self.every // COMPARISONS, 1) == 0:
                same = agreement()
                self._agreed = same.sum() if self._agreed is None else self._agreed + same.sum()
                self._compared += same.numel()

        for other in self._teachers:
            other.watch = compare

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # one observation per multiple of `every`, however many batches or optimizers make a step
        if trainer.global_step // self.every != self._seen // self.every:
            # the step under which Lightning logs, as in its LearningRateMonitor
            self._log(trainer, pl_module, trainer.fit_loop.epoch_loop._batches_that_stepped)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = max(trainer.fit_loop.epoch_loop._batches_that_stepped - 1, 0)
        if not self._quantized:
            self._observe(trainer, pl_module)
        if trainer.global_step != self._seen:
            self._log(trainer, pl_module, step)
        self._write(trainer, step)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.codes:
            return
        # no step was left, so training neither started nor ended; the Trainer has already moved all tensors to the CPU,
        # where NCCL cannot gather sharded ones
        sharded = any(hasattr(parameter, "full_tensor") for parameter in pl_module.parameters())
        if trainer.strategy.root_device.type == "cpu" or not sharded:
            self._observe(trainer, pl_module)
            self._write(trainer, 0)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for other in self._teachers:
            other.watch = None
        self._teachers, self._agreed = [], None

    @property
    def _quantized(self) -> bool:
        return any(row.weight_bits < 32 for row in self.table)

    def _observe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = observed_layers(pl_module)
        if not layers:
            return
        observed = [
            self._watches.setdefault(name, LayerWatch()).observe(layer).to(pl_module.device) for name, layer in layers
        ]
        values = torch.stack(observed).tolist()  # the only sync with the device
        for (name, _), numbers in zip(layers, values, strict=True):
            self._start.setdefault(name, [_known(number) for number in numbers[-2:]])
        self.table = [
            _row(name, layer, dict(zip(NUMBERS, numbers, strict=True)), self._start[name])
            for (name, layer), numbers in zip(layers, values, strict=True)
        ]

    def _log(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self._seen = trainer.global_step
        if self._quantized:
            self._observe(trainer, pl_module)
        summary = _summary([row for row in self.table if row.weight_bits < 32])
        if self._teachers:
            summary |= self._agreement(trainer, pl_module)
        if not summary:
            return
        # not pl_module.log, which drops values logged between the Trainer's own log steps
        for logger in trainer.loggers:
            logger.log_metrics(summary, step=step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in summary.items()})

    def _agreement(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        agreed = torch.zeros((), device=pl_module.device) if self._agreed is None else self._agreed.float()
        counts = torch.stack([agreed, torch.full_like(agreed, self._compared)])
        total = trainer.strategy.reduce(counts, reduce_op="sum")
        self._agreed, self._compared = None, 0
        assert isinstance(total, Tensor)
        same, compared = total.tolist()
        return {"distill/teacher_agreement": same / compared} if compared else {}

    def _write(self, trainer: Trainer, step: int) -> None:
        """Write the table with each logger that supports one."""
        counts = [watch.histogram().cpu() for watch in self._watches.values()]
        self.codes = torch.stack(counts).sum(dim=0).tolist() if counts else [0] * BINS
        if not self.table or not trainer.is_global_zero:
            return
        columns = [field.name for field in fields(MonitorRow)]
        rows = [list(asdict(row).values()) for row in self.table]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("layers", columns=columns, data=rows, step=step)
            elif isinstance(logger, TensorBoardLogger):
                lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
                logger.experiment.add_text("layers", "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
            elif isinstance(logger, CSVLogger):
                with fsspec.open(os.path.join(logger.log_dir, "layers.csv"), "w", newline="") as file:
                    csv.writer(file).writerows([columns, *rows])


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]  # set by Lightning's callback connector


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def _drift(now: float, start: float | None) -> float | None:
    return None if math.isnan(now) or not start else now / start - 1


def _row(name: str, layer: nn.Module | QATWeight, numbers: dict[str, float], start: list[float | None]) -> MonitorRow:
    weight_quant = layer.weight_fake_quant if isinstance(layer, QATWeight) else None
    input_quant = layer.input_fake_quant if isinstance(layer, QATWeight) else None
    return MonitorRow(
        name=name,
        weights=weight_of(layer).numel(),
        weight_bits=weight_quant.spec.num_bits if weight_quant else 32,
        activation_bits=input_quant.spec.num_bits if input_quant else 32,
        weight_error=numbers["weight_error"],
        clip_rate=numbers["clip_rate"],
        sparsity=numbers["sparsity"],
        oscillation=_known(numbers["oscillation"]),
        weight_scale_drift=_drift(numbers["weight_scale"], start[0]),
        input_scale_drift=_drift(numbers["input_scale"], start[1]),
    )


def _summary(rows: list[MonitorRow]) -> dict[str, float]:
    """Return means over all weights and over all scales; empty without quantized weights."""
    if not rows:
        return {}
    total = sum(row.weights for row in rows)
    summary = {
        f"quant/{key}": sum(getattr(row, key) * row.weights for row in rows) / total
        for key in ("weight_error", "clip_rate", "sparsity")
    }
    seen = [row for row in rows if row.oscillation is not None]
    if seen:
        turned = sum((row.oscillation or 0.0) * row.weights for row in seen)
        summary["quant/oscillation"] = turned / sum(row.weights for row in seen)
    drifts = [drift for row in rows for drift in (row.weight_scale_drift, row.input_scale_drift) if drift is not None]
    if drifts:
        # frozen scales would dilute the mean
        moved = [abs(drift) for drift in drifts if drift]
        summary["quant/scale_drift"] = sum(moved) / max(len(moved), 1)
    return summary


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
