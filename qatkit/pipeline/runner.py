"""Run a recipe stage by stage. Stages pass results through files, so an interrupted run can resume."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from qatkit.common.device import check_accelerator, device_count
from qatkit.common.files import write_atomically
from qatkit.data.datamodule import SplitDataModule
from qatkit.data.streaming import StreamingDataModule
from qatkit.errors import QatkitError, QatkitWarning, did_you_mean
from qatkit.pipeline.finishing import delete_training_files
from qatkit.pipeline.logger_check import check_logger
from qatkit.pipeline.processes import as_launcher, end_with_parent, has_launcher, is_first_process
from qatkit.pipeline.progress import Style
from qatkit.pipeline.stage import StagePrint, run_stage
from qatkit.pipeline.tracking import Tracking
from qatkit.recipe.loading import recipe_to_yaml
from qatkit.run.checkpoint import find_checkpoint, has_checkpoint
from qatkit.run.fingerprint import fingerprint, refuse_changes, stage_inputs
from qatkit.run.folder import Run
from qatkit.run.lock import locked
from qatkit.run.record import read_record, read_started
from qatkit.run.sharing import shared_name
from qatkit.run.stage_files import check_files


def run_stages(
    run: Run,
    until: str | None = None,
    force: bool = False,
    progress: Sequence[Style] = (),
    tracking: Tracking | None = None,
) -> list[str]:
    """Train the unfinished stages of a recipe.

    A finished stage is left untouched, and a started stage resumes from its last checkpoint. An error is raised if the
    inputs of either have changed.

    Args:
        run: The recipe and its folder.
        until: The last stage to train. By default, all stages are trained.
        force: Delete stages whose inputs have changed, and the stages after them, and train them again.
        progress: How to show the progress of each stage.
        tracking: Loggers for metrics. Pass a `Tracking` object to keep it open after training; by default, a new one is
            created and closed at the end.

    Returns:
        The names of the stages that were trained.

    Raises:
        QatkitError: a stage in the folder was trained with different inputs, `until` is not a stage, another process is
            using the folder, or a file would be written outside it.
    """
    run.check_writes(training=True)
    if not is_first_process():
        end_with_parent()
        return _run_stages(run, until, force, progress, tracking)
    if has_launcher():  # a sweep
        end_with_parent()
    with as_launcher(), locked(run.out):
        return _run_stages(run, until, force, progress, tracking)


def _run_stages(
    run: Run, until: str | None, force: bool, progress: Sequence[Style], tracking: Tracking | None
) -> list[str]:
    check_logger(run.recipe.trainer)
    check_accelerator(run.recipe.trainer.accelerator)
    names = list(run.recipe.stages)
    if until is not None and until not in names:
        raise QatkitError(f"'{until}' is not a stage", key="--until", advice=did_you_mean(until, names))
    wanted = names[: names.index(until) + 1] if until else names
    prints = stage_prints(run)
    if is_first_process():
        _check_folder(run, prints, force)
        write_atomically(run.out / "recipe.yaml", recipe_to_yaml(run.recipe))
    # decided once, from values that are equal on every process: one process may look while another one deletes
    finished = {
        name for name in wanted if (record := run.find(name)) and record.fingerprint == prints[name].fingerprint
    }
    trained = [name for name in wanted if name not in finished]
    if is_first_process():
        for name in finished:  # a process that was killed after it finished the stage left them
            delete_training_files(run.folder(name))
    _check_batch_sizes(run, trained)
    shared = tracking or Tracking(run)
    try:
        for name in trained:
            with _locked_if_shared(run, name):
                run_stage(run, name, prints[name], shared, progress)
    finally:
        if tracking is None:
            shared.close()
    return trained


def _check_batch_sizes(run: Run, names: Sequence[str]) -> None:
    """Refuse a stage whose batch is larger than the training data, before an earlier stage is trained.

    The last incomplete batch of an epoch is dropped, so such a stage would never train.
    """
    sizes = {name: stage.batch_size for name, stage in run.recipe.stages.items() if name in names and stage.max_steps}
    if not sizes:
        return
    data = run.build_data(min(sizes.values()))
    if not isinstance(data, SplitDataModule) or isinstance(data, StreamingDataModule):
        return  # the number of samples is not known before training
    data.prepare_data()
    processes = device_count(run.recipe.trainer.accelerator, run.recipe.trainer.devices)
    samples = len(data.train) // processes  # type: ignore[arg-type]  # a map-style data set
    for name, size in sizes.items():
        if size > samples:
            each = f" on each of {processes} processes" if processes > 1 else ""
            raise QatkitError(
                f"{size} exceeds the {samples} training samples{each}, and incomplete batches are dropped",
                key=f"stages.{name}.batch_size",
                advice=f"use a batch_size of at most {samples}, or more data",
            )


def resume_advice(run: Run) -> str:
    """Return how to resume a run that ended early, for its last message."""
    unfinished = [name for name in run.recipe.stages if not (run.folder(name) / "stage.json").is_file()]
    if not unfinished:
        return "all stages are trained; run the same command again to finish the run"
    if has_checkpoint(run.folder(unfinished[0])):
        return f"run the same command again to resume stage '{unfinished[0]}' from the last checkpoint"
    kept = ", finished stages are kept" if unfinished[0] != next(iter(run.recipe.stages)) else ""
    return f"stage '{unfinished[0]}' has no checkpoint yet; run the same command again to restart it{kept}"


def _locked_if_shared(run: Run, stage: str) -> AbstractContextManager[None]:
    return locked(run.folder(stage)) if run.is_shared(stage) and is_first_process() else nullcontext()


def stage_prints(run: Run) -> dict[str, StagePrint]:
    """Return the inputs and the fingerprint of every stage of a run."""
    prints: dict[str, StagePrint] = {}
    for name in run.recipe.stages:
        inputs, parent = stage_inputs(run.recipe, name), run.recipe.parent_of(name)
        # a teacher need not be among the stages that the model comes from
        teacher = run.recipe.teacher_of(name) if run.recipe.stages[name].distill else None
        before, beside = (prints[stage].fingerprint if stage else None for stage in (parent, teacher))
        prints[name] = StagePrint(inputs, fingerprint(inputs, before, beside))
    return prints


def _check_folder(run: Run, prints: dict[str, StagePrint], force: bool) -> None:
    """Reject stages of a different recipe, finished or started; with `force`, delete them."""
    for name, stage_print in prints.items():
        if run.is_shared(name) and run.folder(name).name != shared_name(name, stage_print.fingerprint):
            raise QatkitError(
                f"stage '{name}' belongs to a sweep, and its inputs have changed",
                key=str(run.out),
                advice="use another --out",
            )
        try:
            _check_stage(run, name, stage_print)
        except QatkitError:
            if not force:
                raise
            # those made from it are found by the fingerprints, which hold that of the stage before
            folder = run.folder(name)
            (folder / "stage.json").unlink(missing_ok=True)  # the record first: a stage without it is not finished
            shutil.rmtree(folder, ignore_errors=True)


def _check_stage(run: Run, name: str, stage_print: StagePrint) -> None:
    folder = run.folder(name)
    recorded = None
    if (record := read_record(folder)) is not None:
        refuse_changes(name, "finished", record.inputs, stage_print.inputs, run.out)
        check_files(folder, record)
        recorded = record.fingerprint
    # before the first checkpoint, a change loses no work
    elif (started := read_started(folder)) is not None and (folder / "last.ckpt").exists():
        refuse_changes(name, "started", started.inputs, stage_print.inputs, run.out)
        recorded = started.fingerprint
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QatkitWarning)  # training gives it
            find_checkpoint(folder)  # raises if none is intact, so that --force trains the stage again
    if recorded not in (None, stage_print.fingerprint):
        raise QatkitError(
            f"stage '{name}' in {run.out} was trained from a different version of the previous stage",
            advice="use --force to rerun the stage",
        )
