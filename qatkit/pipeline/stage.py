"""One stage of a run: its input model, its training, and the result in its folder."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import distributed, nn

from qatkit import tasks
from qatkit.callbacks.batches import first_batches
from qatkit.data.datamodule import unsliced
from qatkit.data.tokenizers import check_tokenizer
from qatkit.pipeline.degradation import warn_if_worse
from qatkit.pipeline.export import check_export_tokenizer
from qatkit.pipeline.finishing import finished_model, save_result
from qatkit.pipeline.processes import is_first_process
from qatkit.pipeline.progress import Style
from qatkit.pipeline.teachers import teacher_spec
from qatkit.pipeline.tracking import Tracking
from qatkit.pipeline.training import train
from qatkit.run.architecture import Architecture, architecture_of
from qatkit.run.compatibility import check_data
from qatkit.run.folder import Run
from qatkit.run.record import StageRecord, Started, read_started, write_started
from qatkit.stages import shrink


@dataclass(frozen=True)
class StagePrint:
    """The inputs that determine the result of a stage."""

    inputs: dict[str, Any]
    """Dotted recipe keys and their values."""
    fingerprint: str
    """A hash of the inputs, chained to the fingerprints of the parent and the teacher."""


def run_stage(run: Run, name: str, stage_print: StagePrint, tracking: Tracking, progress: Sequence[Style]) -> None:
    """Train a stage and save its result.

    Args:
        run: The run; the stages on which this one depends are finished.
        name: The stage.
        stage_print: The stage's inputs and fingerprint.
        tracking: Loggers for the stage's metrics.
        progress: How to show the progress.
    """
    folder = run.folder(name)
    began = time.perf_counter()
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        before = read_started(folder)
        processes = before.processes if before is not None else None
        write_started(folder, Started(stage_print.inputs, stage_print.fingerprint, processes))
    stage = run.recipe.stages[name]
    spec = teacher_spec(run, name, is_first_process()) if stage.distill else None
    parent = run.recipe.parent_of(name)
    start = run.record(parent) if parent else None
    architecture = start.architecture if start else Architecture(stage.model) if stage.model else None
    held = start.zeros if start and stage.hold_sparsity else {}
    model = run.start_model(name)
    if stage.shrink is not None:
        calibration = run.build_data(stage.batch_size)
        batches = _training_batches(calibration, stage.shrink.calibration_batches)
        loss = partial(tasks.mean_loss, declared=tasks.declared_task(calibration))
        model = shrink.apply(stage.shrink, model, batches, tasks.call, loss)
        architecture = architecture_of(model, architecture or Architecture(run.recipe.model), run.allow)
    rewound = _rewound(run, name, architecture)
    data = run.build_data(stage.batch_size)
    check_data(model, data)
    tokenizer = getattr(data, "tokenizer", None)
    check_tokenizer(model, tokenizer)
    check_export_tokenizer(run.recipe, tokenizer)
    result = train(
        run.recipe,
        name,
        model,
        spec,
        run.build_data,
        folder,
        tracking.loggers(name),
        list(held),
        rewound,
        progress,
    )
    if result.trainer.is_global_zero:
        fresh = run.start_model(name) if stage.shrink is None else run.build_model(architecture)
        model = finished_model(fresh, result, folder, run.is_original(name))
        record = StageRecord(
            name=name,
            fingerprint=stage_print.fingerprint,
            inputs=stage_print.inputs,
            folds=[*(start.folds if start else []), *result.folds],
            zeros=dict.fromkeys(result.held, 0),  # counted when the weights are saved
            architecture=architecture,
            early_stopping=result.early_stopping,
            seconds=round(time.perf_counter() - began, 3),
            versions={package: version(package) for package in ("qatkit", "torch", "lightning")},
        )
        save_result(folder, model, record, run.build_data(stage.batch_size))
        codes = result.monitor.codes if stage.quantize else []
        metrics = run.record(name).metrics
        warn_if_worse(name, result.before, metrics)
        tracking.log_stage(name, metrics, codes, result.trainer.global_step)
    result.trainer.strategy.barrier(f"stage {name}")
    del result
    gc.collect()


def _rewound(run: Run, name: str, architecture: Architecture | None) -> nn.Module | None:
    """The model whose weights the stage rewinds to; None if it does not rewind."""
    rewind = run.recipe.stages[name].rewind
    if rewind is None:
        return None
    if rewind.seed is not None:
        return run.build_model(architecture, rewind.seed)
    return run.load_model(rewind.stage, quantizers=False)


def _training_batches(data: LightningDataModule, count: int) -> list[Any]:
    """The first batches of the training data, the same on every process, and those of one process.

    A process group exists where this command trained an earlier stage, and not yet where an earlier command did: both
    must give the same batches.
    """
    data.prepare_data()
    data.setup("fit")
    with unsliced():
        batches = [list(first_batches(data.train_dataloader(), count))]
    if distributed.is_available() and distributed.is_initialized():  # a data module of the user's may slice by itself
        distributed.broadcast_object_list(batches)
    return batches[0]
