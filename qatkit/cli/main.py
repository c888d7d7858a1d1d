"""The command line: every command takes a recipe or the folder of a run.

Exit codes: 0 done; 1 a verification failed; 2 a mistake in the recipe, the command or the folder; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatkit.cli.arguments import Allow, AsJson, Overrides, Quiet, RecipeArgument, RunArgument, SkipBad
from qatkit.cli.plan import plan, print_training
from qatkit.cli.sensitivity import allocate, sensitivity
from qatkit.errors import QatkitError, QatkitWarning

if TYPE_CHECKING:
    from qatkit.pipeline.tracking import Tracking
    from qatkit.recipe import Recipe
    from qatkit.run.folder import Run

app = typer.Typer(
    name="qatkit",
    help="Training-time compression of PyTorch models: what you train is what you ship.",
    epilog="Exit codes: 0 done; 1 a verification failed; 2 a mistake, named in one message; 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command("list")
def list_command() -> None:
    """List the recipes that come with qatkit.

    Example: qatkit list
    """
    from qatkit.recipe.loading import list_recipes, recipe_text

    for name in list_recipes():
        typer.echo(f"{name:24} {recipe_text(name).splitlines()[0].lstrip('# ')}")


@app.command()
def show(name: Annotated[str, typer.Argument(help="A name from `qatkit list`.")]) -> None:
    """Print a recipe, to read or to copy.

    Example: qatkit show vision/digits_int4 > mine.yaml
    """
    from qatkit.recipe.loading import recipe_text

    typer.echo(recipe_text(name), nl=False)


@app.command()
def validate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option(help="Accept stages that need more memory than the device has.")] = False,
    allow: Allow = None,
    skip_bad: SkipBad = False,
) -> None:
    """Check a recipe down to its layers, and predict its memory, without reading data or training.

    Example: qatkit validate mine.yaml stages.qat.lr=1e-4 --allow my_package
    """
    from qatkit.pipeline.validation import validate_recipe

    loaded = _load(recipe, overrides or [], skip_bad)
    layers = validate_recipe(loaded, allow or [])
    typer.echo(f"{loaded.name}: valid, stages {', '.join(loaded.stages)}")
    for stage, names in layers.items():
        typer.echo(f"  {stage}: quantizes {len(names)} layers: {', '.join(names[:6])}{', ...' if names[6:] else ''}")
    print_training(loaded, allow or [], force)


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME by default.")] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    force: Annotated[
        bool, typer.Option(help="Train stages again whose values have changed, even if memory does not suffice.")
    ] = False,
    allow: Allow = None,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train, export, verify, measure and report. Run it again to continue where it was.

    Example: qatkit run vision/digits_int4 stages.qat.max_steps=300 --out runs/mine
    """
    from qatkit.pipeline.validation import validate_recipe

    loaded = _load(recipe, overrides or [], skip_bad)
    validate_recipe(loaded, allow or [])
    from qatkit.pipeline.processes import is_first_process, leave_processes
    from qatkit.pipeline.runner import run_stages
    from qatkit.pipeline.tracking import Tracking
    from qatkit.run.folder import Run

    if is_first_process():
        print_training(loaded, allow or [], force, quiet or as_json)
    # Lightning sets its level when it is imported; what it says at start is for whoever writes a Trainer
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    this = Run(loaded, out or Path("runs") / loaded.name, allow or [])
    tracking = Tracking(this.recipe, this.out)
    try:
        progress = sys.stderr.isatty() and not quiet
        trained = run_stages(this, until, force, progress, tracking)
    except KeyboardInterrupt:
        typer.echo("interrupted: the same command continues from the last checkpoint", err=True)
        raise typer.Exit(130) from None
    leave_processes()
    if not is_first_process():
        return
    for name in loaded.stages:
        if (record := this.find(name)) is not None and not (quiet or as_json):
            state = f"trained in {record.seconds:.1f} s" if name in trained else "finished before, untouched"
            if (early := record.early_stopping) is not None:
                stopped = f"stopped after {early['steps']} steps" if early["stopped"] else "not stopped early"
                state += f", {stopped}, best at step {early['best_step']}"
            typer.echo(f"stage {name}: {state}, {_measured(record.metrics)}")
    if until is None and loaded.export is not None:
        _deliver(this, tracking, quiet, as_json)
    elif not (quiet or as_json):
        typer.echo("nothing is exported or compared: " + ("--until" if until else "the recipe has no export block"))


@app.command("cache-teacher")
def cache_teacher(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME by default.")] = None,
    allow: Allow = None,
    quiet: Quiet = False,
) -> None:
    """Write what the teachers of a recipe say of the training data, for stages whose distill block has a cache.

    `qatkit run` does it by itself before such a stage; by this command it can be done elsewhere, on a larger machine
    for example. Run it again after a kill: it goes on where it was.

    Example: qatkit cache-teacher mine.yaml --out runs/mine
    """
    from qatkit.pipeline.validation import validate_recipe
    from qatkit.recipe.loading import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    validate_recipe(loaded, allow or [])
    from qatkit.pipeline.teacher_cache import write_caches
    from qatkit.run.folder import Run

    for line in write_caches(Run(loaded, out or Path("runs") / loaded.name, allow or [])):
        if not quiet:
            typer.echo(line)


@app.command()
def export(run: RunArgument, allow: Allow = None) -> None:
    """Write the finished stages of a run in the recipe's export format.

    Example: qatkit export runs/digits_int4
    """
    from qatkit.pipeline.export import export_run, format_of

    this = _open(run, allow)
    for path in export_run(this):
        typer.echo(f"{path} ({format_of(this).size(path):,} bytes)")


@app.command()
def verify(run: RunArgument, allow: Allow = None, as_json: AsJson = False) -> None:
    """Reload the exported files in their runtime and prove that they compute what training computed.

    Example: qatkit verify runs/digits_int4
    """
    from qatkit.pipeline.verify import verify_run

    checked = verify_run(_open(run, allow))
    if as_json:
        typer.echo(json.dumps({stage: asdict(verification) for stage, verification in checked.items()}))
    for stage, verification in checked.items() if not as_json else ():
        typer.echo(f"{stage}: {verification.summary()}")
    if not all(verification.passed for verification in checked.values()):
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN ...]", help="The folder of a run, or of several.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; RUN/report.html, or ./report.html for several runs.")
    ] = None,
    allow: Allow = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure a run's exported files and write report.json, report.md and report.html, or compare several runs.

    Example: qatkit report runs/digits_int8 runs/digits_int4 --out report.html
    """
    from qatkit.pipeline.report import report_run, track_run
    from qatkit.pipeline.tracking import Tracking
    from qatkit.report.page import write_page

    if len(runs) == 1:
        this = _open(runs[0], allow)
        content = report_run(this)
        _present(content, this.out, out, quiet, as_json)
        track_run(this, content, Tracking(this.recipe, this.out))
        return
    page = out or Path("report.html")
    write_page(runs, page)
    if not quiet:
        typer.echo(f"page: {page}")


app.command()(sensitivity)
app.command()(allocate)
app.command()(plan)


def _load(recipe: str, overrides: list[str], skip_bad: bool) -> Recipe:
    from qatkit.recipe.loading import load_recipe

    loaded = load_recipe(recipe, overrides)
    if not skip_bad:
        return loaded
    if not isinstance(loaded.data.args.get("source"), dict):
        raise QatkitError(
            f"--skip-bad: {loaded.data.factory} has no source in data.args to skip records of; leave it out"
        )
    return load_recipe(recipe, [*overrides, "data.args.source.skip_bad=true"])


def _measured(metrics: dict[str, float]) -> str:
    if "test/perplexity" in metrics:
        return f"test perplexity {metrics['test/perplexity']:.3f}"
    return f"test accuracy {metrics['test/accuracy']:.2%}"


def _open(folder: Path, allow: list[str] | None) -> Run:
    from qatkit.recipe.loading import load_recipe
    from qatkit.run.folder import Run

    if not (folder / "recipe.yaml").is_file():
        raise QatkitError(f"{folder}: no run is here (it has no recipe.yaml); write the --out folder of `qatkit run`")
    return Run(load_recipe(folder / "recipe.yaml"), folder, allow or [])


def _deliver(this: Run, tracking: Tracking, quiet: bool, as_json: bool) -> None:
    from qatkit.pipeline.export import export_run
    from qatkit.pipeline.report import report_run, track_run
    from qatkit.pipeline.verify import verify_run

    export_run(this)
    checked = verify_run(this)
    content = report_run(this)
    _present(content, this.out, None, quiet, as_json)
    track_run(this, content, tracking)
    failed = {stage: verification for stage, verification in checked.items() if not verification.passed}
    for stage, verification in failed.items():
        typer.echo(f"verification of '{stage}' failed: {verification.summary()}", err=True)
    if failed:
        raise typer.Exit(1)


def _present(content: dict[str, object], folder: Path, page: Path | None, quiet: bool, as_json: bool) -> None:
    """Write the page beside the report, then print the comparison as it was asked for."""
    from rich.console import Console

    from qatkit.report.page import missing_packages, write_page
    from qatkit.report.tables import kernel_notes, terminal_table

    if page is None and (missing := missing_packages()) is not None:
        where = f"no report.html: {missing}, then: qatkit report {folder}"
    else:
        page = page or folder / "report.html"
        write_page([folder], page)
        where = f"page: {page}"
    if as_json:
        typer.echo(json.dumps(content))
    elif not quiet:
        Console(width=None if sys.stdout.isatty() else 160).print(terminal_table(content))
        for note in kernel_notes(content):
            typer.echo(f"note: {note}")
        typer.echo(f"report: {folder / 'report.md'}\n{where}")


def main() -> None:
    """Run the command line, and turn a user's mistake into one message without a traceback."""
    warnings.showwarning = _show_warning
    try:
        app()
    except QatkitError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        typer.echo(f"error: {error.filename or ''}: {error.strerror or error}; write another path", err=True)
        sys.exit(2)


_show = warnings.showwarning


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
    if issubclass(category, QatkitWarning):
        typer.echo(f"warning: {message}", err=True)
    else:
        _show(message, category, *rest, **named)
