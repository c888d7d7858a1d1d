"""`qatkit run`."""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from qatkit.cli.arguments import Allow, AllowWrite, AsJson, Out, Overrides, Quiet, RecipeArgument, SkipBad
from qatkit.cli.exits import VERIFICATION_FAILED
from qatkit.cli.inputs import load, new_run, writing
from qatkit.cli.memory import print_training
from qatkit.cli.output import echo
from qatkit.cli.report import present
from qatkit.cli.verify import present_verifications
from qatkit.common.termination import termination
from qatkit.recipe.factories import resolve
from qatkit.tasks.metrics import METRICS
from qatkit.tasks.table import Task, declared_task

if TYPE_CHECKING:
    from qatkit.pipeline.progress import Style
    from qatkit.pipeline.tracking import Tracking
    from qatkit.run.folder import Run


def command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Retrain stages whose inputs have changed, and ignore the memory prediction."),
    ] = False,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Measure latency and write the report after verification.")
    ] = True,
    allow: Allow = None,
    allow_write: AllowWrite = None,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: train, export, verify, measure and report.

    To resume an interrupted run, run the same command again. On SIGTERM, the run saves a checkpoint before it exits.

    Example: qatkit run vision/digits_int4 stages.qat.max_steps=300 --out runs/mine
    """
    loaded = load(recipe, overrides, skip_bad)  # errors in it are reported before torch is imported
    from qatkit.pipeline.validation import validate_recipe

    validate_recipe(loaded, allow or [])
    from qatkit.pipeline.processes import is_first_process, leave_processes
    from qatkit.pipeline.runner import resume_advice, run_stages
    from qatkit.pipeline.tracking import Tracking
    from qatkit.run.lock import local_holder

    # Lightning sets its log level on import; its startup messages are not useful here
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    this = new_run(loaded, out, allow, allow_write)
    tracking, progress = Tracking(this), _progress(quiet, as_json)
    if (ending := termination()) is not None:
        ending.hint = partial(resume_advice, this)
    if not is_first_process():
        if ending is not None:
            ending.follow(local_holder(this.out))
        run_stages(this, until, force, progress, tracking)
        leave_processes()
        return
    with writing(this, quiet):
        print_training(loaded, allow or [], force, quiet or as_json)
        trained = run_stages(this, until, force, progress, tracking)
        leave_processes()
        if not (quiet or as_json):
            _print_stages(this, trained)
        if until is None and loaded.export is not None:
            _finish(this, tracking, report, quiet, as_json)
        elif not (quiet or as_json):
            reason = "--until is set" if until else "the recipe has no export block"
            echo(f"export and report are skipped: {reason}")


def _progress(quiet: bool, as_json: bool) -> list[Style]:
    """A progress bar for a terminal, and lines for a log file."""
    styles: list[Style] = []
    if not quiet and sys.stderr.isatty():
        styles.append("bar")
    if not (quiet or as_json or sys.stdout.isatty()):
        styles.append("lines")
    return styles


def _print_stages(this: Run, trained: list[str]) -> None:
    task = declared_task(resolve(this.recipe.data.factory, "data.factory", this.allow))
    for name in this.recipe.stages:
        if (record := this.find(name)) is None:
            continue
        state = f"trained in {record.seconds:.1f} s" if name in trained else "already finished"
        if (early := record.early_stopping) is not None:
            stopped = f"stopped after {early['steps']} steps" if early["stopped"] else "not stopped early"
            state += f", {stopped}, best step {early['best_step']}"
        echo(f"stage {name}: {state}, {_metric(record.metrics, task)}")


def _metric(metrics: dict[str, float], task: Task | None) -> str:
    """The stage's main metric; without a declared task, it is the perplexity or the accuracy."""
    undeclared = "perplexity" if "test/perplexity" in metrics else "accuracy"
    metric = METRICS[undeclared if task is None else task.metric]
    return f"test {metric.name} {metric.show(metrics[f'test/{metric.name}'])}"


def _finish(this: Run, tracking: Tracking, report: bool, quiet: bool, as_json: bool) -> None:
    """Export, verify and, unless it is disabled, report."""
    from qatkit.pipeline.report import report_run, track_run
    from qatkit.pipeline.verify import export_and_verify

    checked = export_and_verify(this)
    if report:
        content = report_run(this)
        present(content, this.out, None, quiet, as_json)
        track_run(this, content, tracking)
    else:
        tracking.close()
        present_verifications(checked, quiet, as_json)
    failed = {stage: verification for stage, verification in checked.items() if not verification.passed}
    for stage, verification in failed.items():
        echo(f"verification of '{stage}' failed: {verification.summary()}", err=True)
    if failed:
        raise typer.Exit(VERIFICATION_FAILED)
