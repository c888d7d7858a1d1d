"""Load the recipe or open the run that a command works on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.recipe import Recipe
    from qatkit.run.folder import Run


def load(recipe: str, overrides: list[str] | None, skip_bad: bool = False) -> Recipe:
    """Load a recipe.

    Args:
        recipe: Its name or path.
        overrides: Values to override.
        skip_bad: Skip unusable records of its data source.
    """
    from qatkit.recipe.loading import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if not skip_bad:
        return loaded
    if not isinstance(loaded.data.args.get("source"), dict):
        raise QatkitError(
            f"{loaded.data.factory} reads no records from data.args.source, so there is nothing to skip",
            key="--skip-bad",
            advice="remove the option",
        )
    return load_recipe(recipe, [*(overrides or []), "data.args.source.skip_bad=true"])


def new_run(recipe: Recipe, out: Path | None, allow: list[str] | None, allow_write: list[Path] | None = None) -> Run:
    """The run of a recipe in a folder, runs/NAME by default."""
    from qatkit.run.folder import Run

    return Run(recipe, out or Path("runs") / recipe.name, allow or [], allow_write or [])


def open_run(folder: Path, allow: list[str] | None, allow_write: list[Path] | None = None) -> Run:
    """The run in a folder."""
    if not (folder / "recipe.yaml").is_file():
        raise QatkitError(
            "not a run folder, because it has no recipe.yaml",
            key=str(folder),
            advice="pass the --out folder of `qatkit run`",
        )
    from qatkit.recipe.loading import load_recipe

    recipe = load_recipe(folder / "recipe.yaml")  # a mistake in it is reported before torch is imported
    from qatkit.run.folder import Run

    return Run(recipe, folder, allow or [], allow_write or [])
