"""`qatkit search`."""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qatkit.cli.arguments import Allow, Overrides, Quiet, RecipeArgument
from qatkit.cli.candidates import Candidates, read_candidates
from qatkit.cli.exits import VERIFICATION_FAILED
from qatkit.cli.inputs import check_path_text
from qatkit.cli.output import echo
from qatkit.common.termination import termination
from qatkit.errors import QatkitError


class Minimize(StrEnum):
    """What a search minimizes."""

    SIZE = "size"
    LATENCY = "latency"
    COST = "cost"


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
    minimize: Annotated[
        Minimize, typer.Option(help="The size of the file, its latency in its runtime, or the price of requests.")
    ] = Minimize.SIZE,
    price: Annotated[
        float | None, typer.Option(min=0, metavar="N", help="The price of the device per hour, for --minimize cost.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Samples per call, for latency and cost.")] = 1,
    candidates: Candidates = "W8A16,W4A16",
    sparsity: Annotated[
        str, typer.Option(metavar="LIST", help="Also try pruned weights: fractions or patterns, such as 0.5,2:4.")
    ] = "",
    depth: Annotated[
        str, typer.Option(metavar="LIST", help="Also try fewer layers: fractions of a transformer's layers to keep.")
    ] = "",
    width: Annotated[
        str, typer.Option(metavar="LIST", help="Also try fewer channels or MLP neurons: fractions to keep.")
    ] = "",
    budget: Annotated[
        str,
        typer.Option(
            metavar="N|MINUTESmin|Ntrials",
            help="The cost of all trainings: in full trainings of the last stage, in minutes, or their number.",
        ),
    ] = "2",
    out: Annotated[Path | None, typer.Option(help="The folder of the search.", show_default="runs/NAME_search")] = None,
    allow: Allow = None,
    quiet: Quiet = False,
) -> None:
    """Find the smallest or fastest model whose metric loses at most a given part.

    The last stage of the recipe trains a quantized model; the search trains it with different formats for its layers.
    It decides by the validation split, and measures the result in its runtime on the test split. If the loss is larger
    there, the command says so, and the exit code is 1.

    Example: qatkit search vision/digits_int4 --max-loss 1% --candidates W8A16,W4A16,W2A16
    """
    from qatkit.recipe.loading import load_recipe
    from qatkit.trials.budget import parse_budget
    from qatkit.trials.variants import parse_variants

    limit, formats, cost = _part(max_loss), read_candidates(candidates), parse_budget(budget)
    variants = parse_variants(sparsity, depth, width)
    if (minimize is Minimize.COST) != (price is not None):
        raise QatkitError(
            "a price is required for --minimize cost, and only for it", key="--price",
            advice="use --minimize cost --price 0.5",
        )  # fmt: skip
    base = load_recipe(recipe, overrides or [])
    from qatkit.common.files import remove_temporary
    from qatkit.run.lock import locked
    from qatkit.trials.bounded import Goal, find
    from qatkit.trials.recipe_subject import RecipeSubject
    from qatkit.trials.search_report import summary, write_report

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    folder = out or Path("runs") / f"{base.name}_search"
    check_path_text(folder, "--out")
    if (ending := termination()) is not None:
        ending.hint = lambda: "run the same command again to resume the search"

    def say(line: str) -> None:
        if not quiet:
            echo(line)

    subject = RecipeSubject(folder, recipe, overrides or [], base, allow or [])
    goal: Goal = "size" if minimize is Minimize.SIZE else "latency"
    with locked(folder):
        remove_temporary(folder)
        found = find(subject, formats, variants, limit, goal, cost, batch, say)
        written = write_report(folder, base.name, found)
    for line in [*summary(found, price, batch), *map(str, written)]:
        echo(line)
    if not found.kept:
        raise typer.Exit(VERIFICATION_FAILED)


def _part(text: str) -> float:
    """A part such as 1% or 0.01."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise QatkitError(f"'{text}' is not a part", key="--max-loss", advice="use a value such as 1% or 0.01")
    return value
