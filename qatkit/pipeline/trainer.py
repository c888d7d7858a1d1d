"""Build a Lightning Trainer from a recipe, and resume training from the last checkpoint."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from qatkit.callbacks import NonFiniteSteps
from qatkit.callbacks.non_finite import FiniteCheckpoint
from qatkit.common.device import device_count
from qatkit.common.files import naming
from qatkit.common.termination import Terminated, termination
from qatkit.pipeline.preemption import hand_over
from qatkit.recipe import StageConfig, TrainerConfig
from qatkit.run.checkpoint import find_checkpoint, save_checkpoint


def build_trainer(
    config: TrainerConfig, stage: StageConfig, callbacks: Sequence[Callback], loggers: Sequence[Logger]
) -> Trainer:
    """Build the Trainer of a stage."""
    trainer = Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        strategy=_strategy(config),
        precision=config.precision,
        max_steps=stage.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=stage.accumulate,
        gradient_clip_val=stage.gradient_clip,
        callbacks=list(callbacks),
        plugins=[DurableCheckpoints()],
        logger=list(loggers),
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the data module slices by rank, in an order that depends only on the seed
        enable_progress_bar=False,  # ours covers the stage, Lightning's an epoch
        enable_model_summary=False,
    )
    loop = _ResumedFitLoop(trainer, min_epochs=trainer.min_epochs, max_epochs=trainer.max_epochs)
    loop.epoch_loop = _ResumedEpochLoop(trainer, trainer.min_steps, trainer.max_steps)
    trainer.fit_loop = loop
    if (ending := termination()) is not None:
        hand_over(trainer, ending)
    if trainer.num_devices > 1 and trainer.strategy.root_device.type == "cpu":
        # processes that each use every core wait for each other at every operator
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // trainer.num_devices))
    return trainer


def fit(trainer: Trainer, module: LightningModule, data: LightningDataModule, folder: Path) -> None:
    """Train a module, resuming from the newest checkpoint in a stage's folder if there is one.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
        Terminated: SIGTERM was received; see `qatkit.pipeline.preemption`.
        QatkitError: no checkpoint of the stage is intact.
    """
    checkpoint = find_checkpoint(folder)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings(), naming(folder):
            _silence_lightning()
            # not as an argument: callbacks must know it before FSDP2 restores it, which is after `on_fit_start`
            trainer.ckpt_path = str(checkpoint) if checkpoint else None
            trainer.fit(module, datamodule=data)
    except SIGTERMException:
        raise Terminated from None
    except SystemExit:  # how Lightning answers Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if (ending := termination()) is not None:
            ending.defer(False)
    if ending is not None:
        ending.check()


def checkpoints(folder: Path, steps: NonFiniteSteps) -> FiniteCheckpoint:
    """Return the callback that writes ``last.ckpt`` at the end of every epoch, replacing the previous one."""
    return FiniteCheckpoint(
        steps, dirpath=folder, filename="last", save_top_k=1, every_n_epochs=1, save_on_train_epoch_end=True,
        enable_version_counter=False,
    )  # fmt: skip


class DurableCheckpoints(TorchCheckpointIO):
    """Writes checkpoints so that one stays intact even if the process is killed; see `qatkit.run.checkpoint`."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, Path(path))


class _ResumedFitLoop(_FitLoop):
    """Resumes as an uninterrupted run would continue, where Lightning 2.6 does not.

    If no step is left to train after a checkpoint, Lightning calls neither the start nor the end hooks of training:
    callbacks would not read the names of their layers from the checkpoint, and the best weights would not be restored.

    After resuming from the end of an epoch, the count of epochs that determines the order of the data is one ahead of
    the epoch, also in later checkpoints.
    """

    @property
    @override
    def skip(self) -> bool:
        resumed = self.trainer.ckpt_path is not None and self.trainer.limit_train_batches != 0
        return not resumed and super().skip

    @override
    def on_advance_start(self) -> None:
        super().on_advance_start()
        assert self._combined_loader is not None
        for loader in self._combined_loader.flattened:  # data are only read after this hook
            _set_sampler_epoch(loader, self.trainer.current_epoch)


class _ResumedEpochLoop(_TrainingEpochLoop):
    """Logs at the same steps after resuming.

    After resuming from the end of an epoch, Lightning 2.6 passes through this loop once without a batch, and counts
    that as a step: everything would be logged one step late.
    """

    @override
    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        steps, no_batch = self._batches_that_stepped, self._skip_next_val
        super().on_advance_end(data_fetcher)
        if no_batch:
            self._batches_that_stepped = steps


def _strategy(trainer: TrainerConfig) -> Any:
    if trainer.strategy != "fsdp2":
        return trainer.strategy
    from lightning.pytorch.strategies import ModelParallelStrategy

    processes = device_count(trainer.accelerator, trainer.devices)
    # the strategy's default is tensor parallelism over all processes, where each would keep gradients of its own
    return ModelParallelStrategy(
        data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def _silence_lightning() -> None:
    """Hide advice about worker counts and logging intervals: it is for users of a Trainer, not of a recipe."""
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*isinstance.*treespec.*")
