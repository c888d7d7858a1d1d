"""Load the recipe or open the run that a command works on."""

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
            f"{loaded.data.factory} does not read records from data.args.source, so no record can be skipped",
            key="--skip-bad",
            advice="remove --skip-bad",
        )
    return load_recipe(recipe, [*(overrides or []), "data.args.source.skip_bad=true"])


def new_run(recipe: Recipe, out: Path | None, allow: list[str] | None, allow_write: list[Path] | None = None) -> Run:
    """The run of a recipe in a folder, runs/NAME by default."""
    from qatkit.run.folder import Run

    if out is not None:
        check_path_text(out, "--out")
    return Run(recipe, out or Path("runs") / recipe.name, allow or [], allow_write or [])


def check_path_text(path: Path, key: str) -> None:
    """Reject a path that is empty or not UTF-8: libraries that write into it need text.

    Args:
        path: From the command line.
        key: The option or argument, for errors.

    Raises:
        QatkitError: the path cannot be used.
    """
    shown = os.fsencode(path).decode("utf-8", "backslashreplace")
    if shown != str(path) or "\0" in shown:
        raise QatkitError(f"'{shown}' is not UTF-8 text", key=key, advice="use another name")


def open_run(folder: Path, allow: list[str] | None, allow_write: list[Path] | None = None) -> Run:
    """The run in a folder."""
    check_path_text(folder, "RUN")
    if not (folder / "recipe.yaml").is_file():
        raise QatkitError(
            "is not a run folder, because it contains no recipe.yaml",
            key=str(folder),
            advice="pass the --out folder of `qatkit run`",
        )
    from qatkit.recipe.loading import load_recipe

    recipe = load_recipe(folder / "recipe.yaml")  # a mistake in it is reported before torch is imported
    from qatkit.run.folder import Run

    return Run(recipe, folder, allow or [], allow_write or [])


@contextmanager
def writing(run: Run, quiet: bool = False) -> Iterator[None]:
    """Hold the lock of a run's folder, and remove temporary files of processes that were killed there.

    Args:
        run: The run.
        quiet: Do not mention the removed files.

    Raises:
        QatkitError: another process is using the folder, or a link in it leads outside.
    """
    from qatkit.common.files import remove_temporary
    from qatkit.run.lock import locked

    run.check_writes()
    with locked(run.out):
        removed = remove_temporary(run.out, exclude=["wandb"])
        if removed and not quiet:
            names = ", ".join(str(path.relative_to(run.out)) for path in removed[:3])
            more = f" and {len(removed) - 3} more" if len(removed) > 3 else ""
            echo(f"removed temporary files of a killed process: {names}{more}", err=True)
        yield
