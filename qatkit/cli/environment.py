"""`qatkit environment`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Annotated

import typer

from qatkit.cli.output import echo
from qatkit.errors import QatkitError


def command(
    format: Annotated[
        str, typer.Argument(metavar="FORMAT", help="A format whose runtime needs one: mlx, gptq, awq or litert.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The environment to create.")],
) -> None:
    """Create a Python environment for a runtime that qatkit's own environment lacks.

    Pass its interpreter, which the command prints, to `qatkit verify --python`.

    Example: qatkit environment mlx mlx-env
    """
    from qatkit.export.formats import FORMATS

    row = FORMATS.row(format, "FORMAT")
    if not row.environment:
        raise QatkitError(
            f"'{row.name}' files run in the environment of qatkit",
            key="FORMAT",
            advice=f"run: pip install 'qatkit[{row.extra}]'" if row.extra else "install nothing",
        )
    if folder.exists():
        raise QatkitError("already exists", key=str(folder), advice="pass a new folder")
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    try:
        venv.create(folder, with_pip=True)
        if subprocess.run([python, "-m", "pip", "install", "--quiet", *row.environment]).returncode:
            raise QatkitError(
                f"pip cannot install {', '.join(row.environment)}",
                advice="see its message above, and run the command again",
            )
    except BaseException:  # interrupted with Ctrl+C, too; the command refuses a folder that exists
        shutil.rmtree(folder, ignore_errors=True)
        raise
    echo(str(python))
