"""One stage of a recipe on Lightning: build the Trainer, fit, and bring the result to one place."""

from __future__ import annotations

import dataclasses
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from qatkit import stages as blocks
from qatkit.callbacks import CompressionMonitor, NonFiniteSteps
from qatkit.callbacks.finite import FiniteCheckpoint, spoiled_by
from qatkit.common.device import device_count
from qatkit.errors import QatkitError
from qatkit.lora.attach import to_full_precision
from qatkit.pipeline.early_stopping import StopEarly
from qatkit.pipeline.module import CompressionModule
from qatkit.pipeline.progress import Style, progress_callbacks
from qatkit.pipeline.teachers import Teaching
from qatkit.quantization.folding import Fold
from qatkit.recipe import LoraConfig, QuantizeConfig, Recipe, TrainerConfig
from qatkit.run.record import read_started, write_started
from qatkit.stages.layer_names import outside
from qatkit.tasks import declared_task


@dataclass(frozen=True)
class Trained:
    """What a fit leaves on every rank."""

    trainer: Trainer
    weights: dict[str, Tensor]
    """The whole state dict on the CPU; empty on ranks other than the first where it was sharded."""
    folds: list[Fold]
    held: list[str]
    """Layers whose zeros are held."""
    quantize: QuantizeConfig | None
    lora: LoraConfig | None
    monitor: CompressionMonitor
    early_stopping: dict[str, Any] | None


def train(
    recipe: Recipe,
    name: str,
    model: nn.Module,
    taught: Teaching | None,
    data: Callable[[int], LightningDataModule],
    folder: Path,
    loggers: Sequence[Logger],
    held: Sequence[str] = (),
    earlier: nn.Module | None = None,
    progress: Sequence[Style] = (),
) -> Trained:
    """Fit one stage, from its last checkpoint if the folder holds one.

    Args:
        recipe: The whole recipe.
        name: The stage to train.
        model: The model at the stage's start, plain layers, on the CPU.
        taught: What the stage learns from, where it distils.
        data: Makes the data module for a batch size.
        folder: The stage's folder.
        loggers: Where the stage's numbers go.
        held: Layers whose zeros an earlier stage made.
        earlier: The model whose weights the stage goes back to, where it rewinds.
        progress: How to show the progress.
    """
    stage = recipe.stages[name]
    quantize = blocks.quantize.callback(stage.quantize) if stage.quantize else None
    monitor = CompressionMonitor()
    pruning = blocks.prune.callbacks(stage.prune, [] if stage.lora else held, model)
    lora = blocks.lora.callback(stage.lora, held, recipe.seed) if stage.lora else None
    rewinding = blocks.rewind.callback(earlier) if earlier is not None else None
    stopping = StopEarly(stage.early_stopping, name, folder) if stage.early_stopping else None
    samples = blocks.samples.callback(stage.samples, folder) if stage.samples else None
    steps = NonFiniteSteps()
    # steps that are left out come first, as others read gradients; pruning before ranges are calibrated on its weights
    ordered = (steps, stopping, *pruning, rewinding, quantize, lora, monitor, samples)
    callbacks: list[Callback] = [callback for callback in ordered if callback is not None]
    if stage.distill is not None:
        assert taught is not None
        callbacks.append(blocks.distill.callback(taught.block, taught.teacher, recipe.seed, taught.vocab_size))
    callbacks += progress_callbacks(progress, name, list(recipe.stages).index(name) + 1, len(recipe.stages))
    last = folder / "last.ckpt"
    callbacks.append(_checkpoints(folder, steps))
    trainer = Trainer(
        accelerator=recipe.trainer.accelerator,
        devices=recipe.trainer.devices,
        strategy=_strategy(recipe.trainer),
        precision=recipe.trainer.precision,
        max_steps=stage.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=stage.accumulate,
        gradient_clip_val=stage.gradient_clip,
        callbacks=callbacks,
        logger=list(loggers),
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the data module slices by rank, in an order that depends on the seed alone
        enable_progress_bar=False,  # ours goes over the whole stage, Lightning's over an epoch
        enable_model_summary=False,
    )
    if trainer.num_devices > 1 and trainer.strategy.root_device.type == "cpu":
        # processes that each take every core wait for each other at every operator
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // trainer.num_devices))
    batches = data(stage.batch_size)
    module = CompressionModule(model, stage, recipe.seed, recipe.trainer.compile, declared_task(batches))
    resumed = last.exists()
    _same_processes(trainer, name, folder, resumed)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():
            _silence_lightning()
            trainer.fit(module, datamodule=batches, ckpt_path=str(last) if resumed else None)
    except SystemExit:  # how Lightning answers Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
    if trainer.global_step < stage.max_steps and not (stopping is not None and stopping.stopped):
        raise QatkitError(
            f"stages.{name}: training ended at step {trainer.global_step} of {stage.max_steps}; the data gave "
            f"{trainer.num_training_batches} batches of {stage.batch_size}; write a smaller batch_size"
        )
    refuse_non_finite(name, spoiled_by(trainer, module.model))
    if stage.lora is not None and stage.lora.bits is not None:
        to_full_precision(module.model)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = cast(dict[str, Tensor], get_model_state_dict(module.model, options=whole))
    folds = [(outside(first), outside(second)) for first, second in quantize.folds] if quantize else []
    zeros = list(dict.fromkeys(outside(layer) for each in pruning for layer in each.layers))
    zeros = zeros or (list(held) if lora else [])
    record = stopping.record(trainer) if stopping is not None else None
    return Trained(trainer, weights, folds, zeros, stage.quantize, stage.lora, monitor, record)


def _same_processes(trainer: Trainer, name: str, folder: Path, resumed: bool) -> None:
    """Refuse to resume on another number of processes: training would see other batches than it began with."""
    if not trainer.is_global_zero:
        return
    started = read_started(folder)
    if started is None:
        return  # trained without the runner
    if resumed and started.processes not in (None, trainer.world_size):
        raise QatkitError(
            f"stage '{name}' was started on {started.processes} processes and would resume on {trainer.world_size}",
            key="trainer.devices",
            advice=f"set trainer.devices={started.processes}, or use --force to train the stage again",
        )
    write_started(folder, dataclasses.replace(started, processes=trainer.world_size))


def refuse_non_finite(name: str, place: str | None) -> None:
    """Raise where a weight is NaN or infinite; `place` names it."""
    if place is not None:
        raise QatkitError(
            f"the stage ended with {place} NaN or infinite; only the checkpoint before it is kept, if there is one",
            key=f"stages.{name}",
            advice="use a smaller lr, a warmup, gradient_clip: 1.0, or model.args.dtype: float32",
        )


def _checkpoints(folder: Path, steps: NonFiniteSteps) -> FiniteCheckpoint:
    """One checkpoint, replaced at every epoch's end by an atomic rename."""
    return FiniteCheckpoint(
        steps, dirpath=folder, filename="last", save_top_k=1, every_n_epochs=1, save_on_train_epoch_end=True,
        enable_version_counter=False,
    )  # fmt: skip


def _strategy(trainer: TrainerConfig) -> Any:
    if trainer.strategy != "fsdp2":
        return trainer.strategy
    from lightning.pytorch.strategies import ModelParallelStrategy

    processes = device_count(trainer.accelerator, trainer.devices)
    # by default the strategy shares the work out as tensor parallelism: each process would then keep its own gradients
    return ModelParallelStrategy(
        data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def _silence_lightning() -> None:
    """Advice about worker counts and logging intervals is for whoever writes a Trainer; here the recipe does."""
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*isinstance.*treespec.*")
