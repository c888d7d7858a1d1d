"""`qatkit validate`."""

from __future__ import annotations

from typing import Annotated

import typer

from qatkit.cli.arguments import Allow, Overrides, RecipeArgument, SkipBad
from qatkit.cli.inputs import load
from qatkit.cli.memory import print_training
from qatkit.cli.output import echo


def command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    force: Annotated[
        bool, typer.Option("--force", help="Succeed even if the predicted memory use exceeds the available memory.")
    ] = False,
    allow: Allow = None,
    skip_bad: SkipBad = False,
) -> None:
    """Check a recipe and predict its memory use, without loading data or training.

    The command checks keys, values, factories and layer names, and whether required packages are installed.

    Example: qatkit validate mine.yaml stages.qat.lr=1e-4 --allow my_package
    """
    loaded = load(recipe, overrides, skip_bad)  # errors in it are reported before torch is imported
    from qatkit.pipeline.validation import validate_recipe

    found = validate_recipe(loaded, allow or [])
    echo(f"{loaded.name}: valid, stages {', '.join(loaded.stages)}")
    for stage, coverage in found.items():
        echo(f"  {stage}: {coverage}")
    for key, path in loaded.written_paths.items():
        echo(f"  {key}: if this path is outside the run folder, `qatkit run` needs --allow-write {path}")
    print_training(loaded, allow or [], force)
