"""Load recipes, open run folders and lock them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qatkit.cli.output import echo
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.recipe import Recipe
    from qatkit.run.folder import Run


def load(recipe: str, overrides: list[str] | None, skip_bad: bool = False) -> Recipe:
    """Load a recipe.

    Args:
        recipe: Name or path.
        overrides: Values to override, as ``key=value``.
        skip_bad: Skip invalid records of the data source.

    Raises:
        QatkitError: the recipe is invalid, or with `skip_bad`, its data has no ``source``.
    """
    from qatkit.recipe.loading import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if not skip_bad:
        return loaded
    if not isinstance(loaded.data.args.get("source"), dict):
        raise QatkitError(
            f"{loaded.data.factory} has no data.args.source, so there are no records to skip",
            key="--skip-bad",
            advice="remove --skip-bad",
        )
    return load_recipe(recipe, [*(overrides or []), "data.args.source.skip_bad=true"])


def new_run(recipe: Recipe, out: Path | None, allow: list[str] | None, allow_write: list[Path] | None = None) -> Run:
    """Return the run of a recipe in a folder (default: runs/NAME)."""
    from qatkit.run.folder import Run

    if out is not None:
        check_path_text(out, "--out")
    return Run(recipe, out or Path("runs") / recipe.name, allow or [], allow_write or [])


def check_path_text(path: Path, key: str) -> None:
    """Raise an error if a path is not valid UTF-8, which libraries that write to it require.

    Args:
        path: A path from the command line.
        key: The option or argument, for error messages.

    Raises:
        QatkitError: the path is not valid UTF-8.
    """
    shown = os.fsencode(path).decode("utf-8", "backslashreplace")
    if shown != str(path) or "\0" in shown:
        raise QatkitError(f"'{shown}' is not valid UTF-8", key=key, advice="use another name")


def open_run(folder: Path, allow: list[str] | None, allow_write: list[Path] | None = None) -> Run:
    """Open the run in a folder."""
    check_path_text(folder, "RUN")
    if not (folder / "recipe.yaml").is_file():
        raise QatkitError(
            "is not a run folder, because it contains no recipe.yaml",
            key=str(folder),
            advice="pass the --out folder of `qatkit run`",
        )
    from qatkit.recipe.loading import load_recipe

    recipe = load_recipe(folder / "recipe.yaml")  # errors in it are reported before torch is imported
    from qatkit.run.folder import Run

    return Run(recipe, folder, allow or [], allow_write or [])


@contextmanager
def writing(run: Run, quiet: bool = False) -> Iterator[None]:
    """Hold the lock of a run folder, and remove temporary files left by killed processes.

    Args:
        run: The run.
        quiet: Do not report the removed files.

    Raises:
        QatkitError: another process is using the folder, or a link in it points outside.
    """
    from qatkit.common.files import remove_temporary
    from qatkit.run.lock import locked

    run.check_writes()
    with locked(run.out):
        removed = remove_temporary(run.out, exclude=["wandb"])
        if removed and not quiet:
            names = ", ".join(str(path.relative_to(run.out)) for path in removed[:3])
            more = f" and {len(removed) - 3} more" if len(removed) > 3 else ""
            echo(f"removed temporary files left by a killed process: {names}{more}", err=True)
        yield
