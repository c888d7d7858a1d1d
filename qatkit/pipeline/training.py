"""The training of a stage: its callbacks, the training run, and the weights gathered from all processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from qatkit import stages as blocks
from qatkit.callbacks import CompressionMonitor, NonFiniteSteps
from qatkit.callbacks.non_finite import non_finite_anywhere
from qatkit.common.termination import termination
from qatkit.errors import QatkitError
from qatkit.lora.attachment import to_full_precision
from qatkit.pipeline.degradation import Before, start_metric
from qatkit.pipeline.early_stopping import StopEarly
from qatkit.pipeline.module import CompressionModule
from qatkit.pipeline.preemption import Preemption
from qatkit.pipeline.progress import Style, progress_callbacks
from qatkit.pipeline.teachers import TeacherSpec
from qatkit.pipeline.trainer import build_trainer, checkpoints, fit
from qatkit.quantization.folding import Fold
from qatkit.quantization.placement.points import Placement
from qatkit.recipe import LoraConfig, QuantizeConfig, Recipe
from qatkit.run.record import EarlyStopped, read_started, write_started
from qatkit.stages.layer_names import outside
from qatkit.tasks import declared_task


@dataclass(frozen=True)
class Trained:
    """The result of training, on every rank."""

    trainer: Trainer
    weights: dict[str, Tensor]
    """The full state dict on the CPU; if the model was sharded, it is empty on all ranks except 0."""
    folds: list[Fold]
    placement: Placement
    """The tensors that are quantized in addition to layer inputs."""
    held: list[str]
    """Layers whose pruned weights stay zero."""
    quantize: QuantizeConfig | None
    lora: LoraConfig | None
    monitor: CompressionMonitor
    early_stopping: EarlyStopped | None
    before: Before | None
    """The validation metric before the first step, if it is comparable to the metric at the end."""


def train(
    recipe: Recipe,
    name: str,
    model: nn.Module,
    teacher_spec: TeacherSpec | None,
    data: Callable[[int], LightningDataModule],
    folder: Path,
    loggers: Sequence[Logger],
    held: Sequence[str] = (),
    earlier: nn.Module | None = None,
    progress: Sequence[Style] = (),
    extra: Sequence[Callback] = (),
) -> Trained:
    """Train one stage, resuming from its last checkpoint if the folder contains one.

    Args:
        recipe: The whole recipe.
        name: The stage to train.
        model: The stage's input model, with plain layers, on the CPU.
        teacher_spec: The stage's teacher, or None without distillation.
        data: Creates the data module for a batch size.
        folder: The stage's folder.
        loggers: Loggers that receive the stage's metrics.
        held: Layers that an earlier stage pruned and whose mask is kept.
        earlier: The model with the weights to which the stage rewinds; None without rewinding.
        progress: How to show the progress.
        extra: Callbacks that run after all others.

    Raises:
        QatkitError: the training set does not fill a batch, a weight is non-finite, or the stage was started on a
            different number of processes.
    """
    stage = recipe.stages[name]
    quantize = blocks.quantize.callback(stage.quantize) if stage.quantize else None
    monitor = CompressionMonitor()
    batches = data(stage.batch_size)
    task = declared_task(batches)
    pruning = blocks.prune.callbacks(stage.prune, [] if stage.lora else held, model, task)
    lora = blocks.lora.callback(stage.lora, held, recipe.seed) if stage.lora else None
    rewinding = blocks.rewind.callback(earlier) if earlier is not None else None
    stopping = StopEarly(stage.early_stopping, name, folder) if stage.early_stopping else None
    samples = blocks.samples.callback(stage.samples, folder) if stage.samples else None
    steps = NonFiniteSteps()
    start = start_metric(stage, task)
    # skipped steps come first, as others read gradients; pruning before the calibration of ranges on pruned weights
    ordered = (steps, stopping, *pruning, rewinding, quantize, lora, monitor, samples)
    callbacks: list[Callback] = [callback for callback in ordered if callback is not None]
    if stage.distill is not None:
        assert teacher_spec is not None
        block, teacher, size = teacher_spec.block, teacher_spec.teacher, teacher_spec.vocab_size
        callbacks.append(blocks.distill.callback(block, teacher, recipe.seed, size, task))
    if start is not None:
        callbacks.append(start)  # behind all that compress the model
    callbacks += progress_callbacks(progress, name, list(recipe.stages).index(name) + 1, len(recipe.stages))
    checkpoint = checkpoints(folder, steps)
    callbacks += [Preemption(termination(), checkpoint), checkpoint, *extra]
    trainer = build_trainer(recipe.trainer, stage, callbacks, loggers)
    module = CompressionModule(model, stage, recipe.seed, recipe.trainer.compile, task)
    _same_processes(trainer, name, folder, resumed=(folder / "last.ckpt").exists())
    fit(trainer, module, batches, folder)
    if trainer.global_step < stage.max_steps and not (stopping is not None and stopping.stopped):
        raise QatkitError(
            f"training ended at step {trainer.global_step} of {stage.max_steps}: the data has only "
            f"{trainer.num_training_batches} batches of {stage.batch_size}",
            key=f"stages.{name}",
            advice="use a smaller batch_size",
        )
    refuse_non_finite(name, non_finite_anywhere(trainer, module.model))
    if stage.lora is not None and stage.lora.bits is not None:
        to_full_precision(module.model)
    gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = cast(dict[str, Tensor], get_model_state_dict(module.model, options=gathered))
    folds = [(outside(first), outside(second)) for first, second in quantize.folds] if quantize else []
    placement = quantize.placement.renamed(outside) if quantize else Placement()
    zeros = list(dict.fromkeys(outside(layer) for each in pruning for layer in each.layers))
    zeros = zeros or (list(held) if lora else [])
    record = stopping.record(trainer) if stopping is not None else None
    before = start.before if start is not None else None
    return Trained(trainer, weights, folds, placement, zeros, stage.quantize, stage.lora, monitor, record, before)


def _same_processes(trainer: Trainer, name: str, folder: Path, resumed: bool) -> None:
    """Refuse to resume with a different number of processes: training would see different batches."""
    if not trainer.is_global_zero:
        return
    started = read_started(folder)
    if started is None:
        return  # trained without the runner
    if resumed and started.processes not in (None, trainer.world_size):
        raise QatkitError(
            f"stage '{name}' was started with {started.processes} processes but would resume with {trainer.world_size}",
            key="trainer.devices",
            advice=f"set trainer.devices={started.processes}, or use --force to retrain the stage",
        )
    write_started(folder, dataclasses.replace(started, processes=trainer.world_size))


def refuse_non_finite(name: str, place: str | None) -> None:
    """Raise an error if a weight is non-finite; `place` describes its location."""
    if place is not None:
        raise QatkitError(
            f"{place} was non-finite at the end of the stage; an earlier checkpoint is kept, if there is one",
            key=f"stages.{name}",
            advice="use a smaller lr, a warmup, gradient_clip: 1.0, or model.args.dtype: float32",
        )
