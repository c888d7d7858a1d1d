"""`qatkit search`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qatkit.cli.arguments import Allow, Overrides, Quiet, RecipeArgument
from qatkit.cli.candidates import Candidates, read_candidates
from qatkit.cli.exits import VERIFICATION_FAILED
from qatkit.cli.inputs import check_path_text
from qatkit.cli.output import echo
from qatkit.common.termination import termination
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.trials.bounded import Found


def command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    max_loss: Annotated[
        str,
        typer.Option(
            metavar="PART",
            help="The largest loss of the metric: points if it is in percent, otherwise relative to the dense model.",
        ),
    ] = "1%",
    candidates: Candidates = "W8A16,W4A16",
    budget: Annotated[
        float, typer.Option(min=1, metavar="N", help="The cost of all trainings, in full trainings of the last stage.")
    ] = 2.0,
    out: Annotated[Path | None, typer.Option(help="The folder of the search.", show_default="runs/NAME_search")] = None,
    allow: Allow = None,
    quiet: Quiet = False,
) -> None:
    """Find the smallest model whose metric loses at most a given part.

    The last stage of the recipe trains a quantized model; the search trains it with different formats for its layers.
    It decides by the validation split, and measures the result in its runtime on the test split. If the loss is larger
    there, the command says so, and the exit code is 1.

    Example: qatkit search vision/digits_int4 --max-loss 1% --candidates W8A16,W4A16,W2A16
    """
    from qatkit.recipe.loading import load_recipe

    limit, formats = _part(max_loss), read_candidates(candidates)
    base = load_recipe(recipe, overrides or [])
    from qatkit.common.files import remove_temporary
    from qatkit.run.lock import locked
    from qatkit.trials.bounded import Search

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    folder = out or Path("runs") / f"{base.name}_search"
    check_path_text(folder, "--out")
    if (ending := termination()) is not None:
        ending.hint = lambda: "run the same command again to resume the search"

    def say(line: str) -> None:
        if not quiet:
            echo(line)

    search = Search(folder, recipe, overrides or [], base, formats, limit, allow or [], say)
    with locked(folder):
        remove_temporary(folder)
        found = search.run(budget)
    for line in summary(found):
        echo(line)
    if not found.kept:
        raise typer.Exit(VERIFICATION_FAILED)


def summary(found: Found) -> list[str]:
    """Return the result of a search in a few lines."""
    promise, part = found.promise, f"{found.limit:.2%}"
    interval = ""
    if promise.interval is not None:
        interval = f" (95% interval: {promise.interval[0]:.2%} to {promise.interval[1]:.2%})"
    where = f"on {promise.samples:,} test samples, in the runtime"
    verdict = f"KEPT: at most {part}" if found.kept else f"NOT KEPT: more than {part}"
    if not found.verified:
        verdict = "NOT KEPT: the file failed verification"
    lines = [
        f"{verdict}; {promise.metric} {promise.found:.4g} instead of {promise.dense:.4g} {where}, a loss of "
        f"{promise.lost:.2%}{interval}",
        f"{found.bytes:,} bytes instead of {found.dense_bytes:,}: {found.dense_bytes / found.bytes:.2f} times smaller",
        f"{promise.flipped:.2%} of the predictions differ from those of the dense model",
    ]
    if promise.worst is not None:
        lines.append(f"the class that lost most is {promise.worst[0]}, by {promise.worst[1]:.2%}")
    rung = found.ladder[found.steps[-1].rung]
    lines += [f"  {group}: {name}" for group, name in rung.formats.items()]
    return [*lines, found.file]


def _part(text: str) -> float:
    """A part such as 1% or 0.01."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise QatkitError(f"'{text}' is not a part", key="--max-loss", advice="use a value such as 1% or 0.01")
    return value
