"""Run a recipe: every stage in order, meeting on disk, so that a killed run continues where it was."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import distributed, nn

from qatkit import stages as blocks
from qatkit import tasks
from qatkit.callbacks.batches import first_batches
from qatkit.data.datamodule import unsliced
from qatkit.data.tokenizers import check_tokenizer
from qatkit.errors import QatkitError
from qatkit.pipeline.teachers import teaching
from qatkit.pipeline.tracking import Tracking, check_logger
from qatkit.pipeline.training import finished_model, save_result, train
from qatkit.recipe import Recipe
from qatkit.recipe.factories import build
from qatkit.recipe.loading import recipe_to_yaml
from qatkit.run.architecture import Architecture, architecture_of, build_architecture
from qatkit.run.checkpoint import StageRecord, load_stage, read_record, read_started, write_atomically
from qatkit.run.compatibility import check_data, with_tokenizer
from qatkit.run.fingerprint import fingerprint, refuse_changes, stage_inputs


class Run:
    """A recipe and the folder its results live in.

    Args:
        recipe: What to do.
        out: The run's folder; made when the first stage starts.
        allow: Packages besides `qatkit` that the recipe may name code from.
    """

    def __init__(self, recipe: Recipe, out: Path, allow: Sequence[str] = ()) -> None:
        self.recipe = recipe
        self.out = out
        self.allow = tuple(allow)
        self.tracking = Tracking(recipe, out)

    def folder(self, stage: str) -> Path:
        """Where a stage's files are."""
        return self.out / "stages" / stage

    def build_model(self, architecture: Architecture | None = None, seed: int | None = None) -> nn.Module:
        """A model as its factory makes it, by default the recipe's; the same initial weights every time.

        Args:
            architecture: What it is built from.
            seed: Gives other weights than the recipe's own does.
        """
        torch.manual_seed(self.recipe.seed if seed is None else seed)
        return build_architecture(architecture or Architecture(self.recipe.model), self.allow)

    def build_data(self, batch_size: int) -> LightningDataModule:
        """The recipe's data, in the order that the seed decides."""
        config = with_tokenizer(self.recipe.data, self.recipe.model, self.allow)
        data = build(config, "data", self.allow, batch_size=batch_size, seed=self.recipe.seed)
        if not isinstance(data, LightningDataModule):
            raise QatkitError(
                f"data.factory: {self.recipe.data.factory} returned no LightningDataModule but {type(data)}"
            )
        return data

    def load_model(self, stage: str | None, quantizers: bool = True) -> nn.Module:
        """The model a finished stage left (None: the model before the first stage), on the CPU.

        Args:
            stage: Its name.
            quantizers: False gives the plain layers with their unrounded weights.
        """
        record = self.find(stage) if stage is not None else None
        model = self.build_model(record.architecture if record else None)
        if stage is not None:
            load_stage(self.folder(stage), model, quantizers)
        return model

    def start_model(self, stage: str) -> nn.Module:
        """The model that a stage begins with, plain layers, on the CPU: its own, or what the stage before it left."""
        if (own := self.recipe.stages[stage].model) is not None:
            return self.build_model(Architecture(own))
        return self.load_model(self.recipe.parent_of(stage), quantizers=False)

    def is_original(self, stage: str) -> bool:
        """Whether a stage trains the weights that the model's factory gives: no stage before has changed them."""
        if self.recipe.stages[stage].shrink is not None:
            return False
        if (before := self.recipe.parent_of(stage)) is None:
            return True
        changed = self.recipe.stages[before]
        return changed.max_steps == 0 and not changed.compresses and self.is_original(before)

    def find(self, stage: str) -> StageRecord | None:
        """What is written of a stage, or None while it is not finished."""
        return read_record(self.folder(stage))

    def record(self, stage: str) -> StageRecord:
        """What is written of a finished stage."""
        record = self.find(stage)
        if record is None:
            raise QatkitError(f"stage '{stage}' of {self.out} is not finished; run the recipe first")
        return record

    @property
    def rows(self) -> list[str]:
        """The stages that a comparison shows: the last before compression or adapters, and all from there on."""
        names = list(self.recipe.stages)
        return names[max(len(self.uncompressed) - 1, 0) :]

    @property
    def uncompressed(self) -> list[str]:
        """The stages before the first that compresses or adapts; those after it train what it made, if nothing more."""
        stages = self.recipe.stages
        return list(takewhile(lambda name: not stages[name].compresses and stages[name].lora is None, stages))


def run_stages(run: Run, until: str | None = None, force: bool = False, progress: bool = False) -> list[str]:
    """Train the stages of a recipe that are not finished yet.

    A finished stage is left untouched; a started one continues at its last checkpoint; both only if nothing that their
    result depends on has changed.

    Args:
        run: The recipe and its folder.
        until: The last stage to train; all by default.
        progress: Draw a bar for each stage.
        force: Delete stages whose inputs have changed, and those after them, and train them again.

    Returns:
        The names of the stages that were trained.

    Raises:
        QatkitError: a stage in the folder was made from other values, or `until` is no stage.
    """
    check_logger(run.recipe.trainer)
    names = list(run.recipe.stages)
    if until is not None and until not in names:
        raise QatkitError(f"--until: '{until}' is no stage; write one of {names}")
    todo = names[: names.index(until) + 1] if until else names
    prints = _fingerprints(run, names)
    if is_first_process():
        _check_folder(run, names, prints, force)
        run.out.mkdir(parents=True, exist_ok=True)
        write_atomically(run.out / "recipe.yaml", recipe_to_yaml(run.recipe))
    # decided once, from values that every process computes alike: a process may look while another one deletes
    finished = {name for name in todo if (record := run.find(name)) and record.fingerprint == prints[name][1]}
    trained = []
    for name in todo:
        if name not in finished:
            _run_stage(run, name, prints[name], progress)
            trained.append(name)
    return trained


def is_first_process() -> bool:
    """Whether this process writes; asked before a process group exists, so the launchers' variables decide."""
    return all(int(os.environ.get(name, 0)) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def leave_processes() -> None:
    """Make what follows the first process's own: data is not divided any more, and no library waits for the others."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _fingerprints(run: Run, names: list[str]) -> dict[str, tuple[dict[str, Any], str]]:
    prints: dict[str, tuple[dict[str, Any], str]] = {}
    for name in names:
        inputs, parent = stage_inputs(run.recipe, name), run.recipe.parent_of(name)
        # a teacher need not be among the stages that the model comes from
        teacher = run.recipe.teacher_of(name) if run.recipe.stages[name].distill else None
        before, beside = (prints[stage][1] if stage else None for stage in (parent, teacher))
        prints[name] = (inputs, fingerprint(inputs, before, beside))
    return prints


def _check_folder(run: Run, names: list[str], prints: dict[str, tuple[dict[str, Any], str]], force: bool) -> None:
    """Every stage that is there, finished or started, must be the one that the recipe describes now."""
    for name in names:
        inputs, _ = prints[name]
        folder = run.folder(name)
        try:
            stale = False
            if (record := read_record(folder)) is not None:
                refuse_changes(name, "finished", record.inputs, inputs, run.out)
                stale = record.fingerprint != prints[name][1]
            elif (folder / "last.ckpt").exists():  # before it there is nothing that a change could cost
                started = read_started(folder)
                if started:
                    refuse_changes(name, "started", started["inputs"], inputs, run.out)
                stale = bool(started) and started["fingerprint"] != prints[name][1]
            if stale:
                raise QatkitError(
                    f"stage '{name}' in {run.out} was made from another stage before it; write --force to run it again"
                )
        except QatkitError:
            if not force:
                raise
            # those made from it are found by the fingerprints, which hold that of the stage before
            (folder / "stage.json").unlink(missing_ok=True)  # the record first: a stage without it is not finished
            shutil.rmtree(folder, ignore_errors=True)


def _run_stage(run: Run, name: str, print_: tuple[dict[str, Any], str], progress: bool) -> None:
    inputs, own = print_
    folder = run.folder(name)
    started = time.perf_counter()
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        started_with = read_started(folder) | {"inputs": inputs, "fingerprint": own}
        write_atomically(folder / "started.json", json.dumps(started_with))
    stage = run.recipe.stages[name]
    taught = teaching(run, name, is_first_process()) if stage.distill else None
    parent = run.recipe.parent_of(name)
    before = run.record(parent) if parent else None
    architecture = before.architecture if before else Architecture(stage.model) if stage.model else None
    held = before.zeros if before and stage.hold_sparsity else {}
    model = run.start_model(name)
    if stage.shrink is not None:
        batches = _training_batches(run.build_data(stage.batch_size), stage.shrink.calibration_batches)
        model = blocks.shrink.apply(stage.shrink, model, batches, tasks.call, tasks.mean_loss)
        architecture = architecture_of(model, architecture or Architecture(run.recipe.model), run.allow)
    earlier = None
    if (back := stage.rewind) is not None:
        earlier = (
            run.build_model(architecture, back.seed) if back.seed is not None else run.load_model(back.stage, False)
        )
    found = run.build_data(stage.batch_size)
    check_data(model, found)
    check_tokenizer(model, getattr(found, "tokenizer", None))
    result = train(
        run.recipe,
        name,
        model,
        taught,
        run.build_data,
        folder,
        run.tracking.loggers(name),
        list(held),
        earlier,
        progress,
    )
    if result.trainer.is_global_zero:
        fresh = run.start_model(name) if stage.shrink is None else run.build_model(architecture)
        model = finished_model(fresh, result, folder, run.is_original(name))
        record = StageRecord(
            name=name,
            fingerprint=own,
            inputs=inputs,
            folds=[*(before.folds if before else []), *result.folds],
            zeros=dict.fromkeys(result.held, 0),  # counted when the weights are saved
            architecture=architecture,
            early_stopping=result.early_stopping,
            seconds=round(time.perf_counter() - started, 3),
            versions={package: version(package) for package in ("qatkit", "torch", "lightning")},
        )
        save_result(folder, model, record, run.build_data(stage.batch_size))
        codes = result.monitor.codes if stage.quantize else []
        run.tracking.log_stage(name, run.record(name).metrics, codes, result.trainer.global_step)
    result.trainer.strategy.barrier(f"stage {name}")
    del result
    gc.collect()


def _training_batches(data: LightningDataModule, count: int) -> list[Any]:
    """The first batches of the training data, the same on every process, and those of one process.

    Processes have met where a stage was trained before, and not yet where it was finished by an earlier run: both must
    give the same batches.
    """
    data.prepare_data()
    data.setup("fit")
    with unsliced():
        batches = [list(first_batches(data.train_dataloader(), count))]
    if distributed.is_available() and distributed.is_initialized():  # a data module of the user's may slice by itself
        distributed.broadcast_object_list(batches)
    return batches[0]
