"""`qatkit sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatkit.cli.arguments import Allow, Quiet, RecipeArgument
from qatkit.cli.exits import BUG, USER_MISTAKE, VERIFICATION_FAILED
from qatkit.cli.inputs import check_path_text
from qatkit.cli.output import echo, print_table
from qatkit.common.termination import termination
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.trials.execution import Ended
    from qatkit.trials.results import Result
    from qatkit.trials.study import Journal
    from qatkit.trials.sweep import Trial


SHOWN_LOSS = 0.01
"""The loss of the metric for which the best files are printed; the page has several."""


def command(
    recipe: RecipeArgument,
    values: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE,...",
            help="Recipe values, such as stages.qat.quantize.weight.num_bits=2,3,4; keys with one value are overrides.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The folder of the sweep.", show_default="runs/NAME_sweep")] = None,
    random: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Run N random configurations instead of all.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Configurations that are trained at the same time.")] = 1,
    agents: Annotated[
        Path | None,
        typer.Option("--wandb", metavar="FILE", help="Write the sweep for W&B agents to a YAML file, and run nothing."),
    ] = None,
    allow: Allow = None,
    quiet: Quiet = False,
) -> None:
    """Run a recipe with all combinations of values, and compare the results in one page.

    All configurations are validated first. Equal stages are computed once. To resume an interrupted sweep, or to retry
    failed configurations, run the same command again; to extend a sweep, add values. Files that fail verification are
    not computed again.

    Example: qatkit sweep vision/digits_int4 stages.qat.quantize.weight.num_bits=2,3,4 model.args.channels=[8,8],[16,16]
    """
    from qatkit.recipe.loading import load_recipe
    from qatkit.trials.grid import configurations, parse_grid

    if agents is not None and agents.exists():
        raise QatkitError("the file exists", key=str(agents), advice="pass another --wandb, or delete the file")
    fixed, grid = parse_grid(values)
    base = load_recipe(recipe, fixed)
    found = configurations(grid, random, base.seed)
    from qatkit.trials.sweep import load_configurations, open_sweep

    recipes = load_configurations(recipe, fixed, found, allow or [])
    if agents is not None:
        _write_agents(agents, base.name, recipe, fixed, grid, random, allow or [])
        return
    from qatkit.common.files import remove_temporary
    from qatkit.run.lock import locked
    from qatkit.trials.study import Journal, check_optuna

    check_optuna()
    folder = out or Path("runs") / f"{base.name}_sweep"
    check_path_text(folder, "--out")
    if (ending := termination()) is not None:
        ending.hint = lambda: "run the same command again to resume the sweep"
    with locked(folder):
        remove_temporary(folder)
        trials = open_sweep(folder, base, found, recipes, allow or [])
        journal = Journal(folder / "trials.log", trials)
        failures = _run(trials, journal, jobs, allow or [], quiet)
        results = _finish(folder, base.name, trials, journal, failures, quiet)
    if (code := _code(failures, results)) != 0:
        raise typer.Exit(code)


def _write_agents(
    path: Path,
    name: str,
    recipe: str,
    fixed: list[str],
    grid: dict[str, list[Any]],
    random: int | None,
    allow: list[str],
) -> None:
    from qatkit.common.files import write_atomically
    from qatkit.trials.agents import agent_sweep

    write_atomically(path, agent_sweep(name, recipe, fixed, grid, random, allow))
    echo(f"start the sweep with: wandb sweep {path}")


def _run(trials: Sequence[Trial], journal: Journal, jobs: int, allow: Sequence[str], quiet: bool) -> dict[int, Ended]:
    """Run the trials that are not finished, and return those that failed."""
    from qatkit.trials.execution import OUTPUT, run_trials
    from qatkit.trials.grid import described

    todo = [trial for trial in trials if not trial.is_finished]
    if not quiet:
        echo(f"{len(trials)} configurations, {len(trials) - len(todo)} of them already finished")

    def started(trial: Trial) -> None:
        if not quiet:
            echo(f"configuration {trial.number} started: {described(trial.values)}")

    def ended(trial: Trial, end: Ended) -> None:
        if trial.is_finished:
            journal.completed(trial)
            if not quiet:
                but = ", but a file failed verification" if end.code == VERIFICATION_FAILED else ""
                echo(f"configuration {trial.number} finished in {end.seconds:.0f} s{but}")
        else:
            where = trial.run.out / OUTPUT
            echo(f"configuration {trial.number} failed: {end.message} (output: {where})", err=True)

    options = [part for name in allow for part in ("--allow", name)]
    ends = run_trials(todo, jobs, options, started, ended)
    return {trial.number: ends[trial.number] for trial in todo if not trial.is_finished}


def _finish(
    folder: Path, name: str, trials: Sequence[Trial], journal: Journal, failures: dict[int, Ended], quiet: bool
) -> Sequence[Result]:
    """Measure all files together, and write the results, the page and the journal."""
    from qatkit.common.files import write_atomically
    from qatkit.report.page import missing_packages
    from qatkit.trials.results import measured_results, write_results
    from qatkit.trials.tables import broken

    finished = [trial for trial in trials if trial.number not in failures]
    reasons = {number: end.message for number, end in failures.items()}
    results = measured_results(finished) if finished else []
    for trial in finished:  # those that a killed sweep did not record
        journal.completed(trial)
    for number, reason in reasons.items():
        journal.failed(trials[number - 1], reason)
    write_results(folder / "results.json", results, reasons)
    page = folder / "report.html"
    missing = missing_packages() if results else "no configuration has finished"
    if missing is None:
        from qatkit.trials.page import render

        write_atomically(page, render(name, trials, results, reasons))
    if not quiet:
        _print(results, trials)
        for number, reason in reasons.items():
            echo(f"configuration {number} failed: {reason}", err=True)
        for result in results:
            if not result.row["verification"]["passed"]:
                echo(broken(result), err=True)
        echo(f"results: {folder / 'results.json'}")
        echo(f"page: {page}" if missing is None else f"no report.html: {missing}")
    return results


def _print(results: Sequence[Result], trials: Sequence[Trial]) -> None:
    """Print the results and the best files."""
    from rich.table import Table

    from qatkit.trials.best import best_files
    from qatkit.trials.tables import comparable, keys_of, numbers, result_table

    for name, group in comparable(results):
        columns, rows = result_table(group, keys_of(trials))
        table = Table(title=name or None)
        for column in ("configuration", *columns):
            table.add_column(column, overflow="fold")
        for result, row in zip(group, rows, strict=True):
            cells = (f"{value} ({remark})" if remark else value for value, remark in row)
            table.add_row(numbers(result.trials), *cells)
        print_table(table)
        for best in best_files(group, [SHOWN_LOSS]):
            echo(
                f"smallest {best.goal} with a test {group[0].metric.name} {best.limit}: {best.value}, configuration "
                f"{numbers(best.result.trials)}, {best.result.row['stage']}"
            )


def _code(failures: dict[int, Ended], results: Sequence[Result]) -> int:
    """The exit code: the most serious one of the failures."""
    if failures:
        return BUG if any(end.code == BUG for end in failures.values()) else USER_MISTAKE
    return 0 if all(result.row["verification"]["passed"] for result in results) else VERIFICATION_FAILED
