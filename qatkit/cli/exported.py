"""The options that choose one exported file of a run, shared by multiple commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qatkit.errors import QatkitError, did_you_mean

if TYPE_CHECKING:
    from qatkit.run.exports import Exported
    from qatkit.run.folder import Run

StageOption = Annotated[
    str | None, typer.Option("--stage", metavar="STAGE", help="The stage.", show_default="the last one")
]
FormatOption = Annotated[
    str | None, typer.Option("--format", metavar="FORMAT", help="The format.", show_default="the recipe's first")
]


def choose(run: Run, stage: str | None, format: str | None) -> Exported:
    """Return an exported file that exists.

    Args:
        run: The run.
        stage: The stage; None is the last one.
        format: The format; None is the main one.

    Raises:
        QatkitError: the run has no such stage or format, or the file does not exist.
    """
    from qatkit.run.exports import exports_of

    exports = exports_of(run)
    name, kind = stage or run.rows[-1], format or exports[0].format.name
    if name not in run.rows:
        raise QatkitError(f"unknown stage '{name}'", key="--stage", advice=did_you_mean(name, run.rows))
    found = next((each for each in exports if (each.stage, each.format.name) == (name, kind)), None)
    if found is None:
        formats = list(dict.fromkeys(each.format.name for each in exports))
        raise QatkitError(
            f"the run has no '{kind}' files", key="--format",
            advice=f"use {' or '.join(formats)}, or run `qatkit export {run.out} --format {kind}`",
        )  # fmt: skip
    if not found.path.exists():
        raise QatkitError(
            "there is no such file or folder", key=str(found.path), advice=f"run `qatkit export {run.out}`"
        )
    return found
