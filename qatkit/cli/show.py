"""`qatkit show`."""

from __future__ import annotations

from typing import Annotated

import typer

from qatkit.cli.output import echo


def command(name: Annotated[str, typer.Argument(metavar="RECIPE", help="A name from `qatkit list`.")]) -> None:
    """Print a recipe.

    Example: qatkit show vision/digits_int4 > mine.yaml
    """
    from qatkit.recipe.loading import recipe_text

    echo(recipe_text(name), nl=False)
