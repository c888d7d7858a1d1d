"""`qatkit export`."""

from __future__ import annotations

from typing import Annotated

import typer

from qatkit.cli.arguments import Allow, AllowWrite, Python, RunArgument
from qatkit.cli.exits import VERIFICATION_FAILED
from qatkit.cli.inputs import open_run, writing
from qatkit.cli.output import echo
from qatkit.errors import QatkitError


def command(
    run: RunArgument,
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="Export and verify this format, in addition to the recipe's."),
    ] = None,
    python: Python = None,
    allow: Allow = None,
    allow_write: AllowWrite = None,
) -> None:
    """Export a run's finished stages.

    The recipe's `export` block sets the formats. With --format, the exit code is 1 if a file fails verification.

    Example: qatkit export runs/digits_int4 --format dense
    """
    this = open_run(run, allow, allow_write)
    from qatkit.export.formats import FORMATS
    from qatkit.export.verification import check_python
    from qatkit.pipeline.export import add_format, export_run
    from qatkit.pipeline.verify import verify_run
    from qatkit.run.exports import exports_of

    if format is not None:
        check_python([FORMATS.row(format, "--format")], python, "--python")
    elif python is not None:
        raise QatkitError(
            "has no effect without --format, because nothing is verified",
            key="--python",
            advice="pass --format, or use `qatkit verify --python`",
        )
    with writing(this):
        _ = export_run(this) if format is None else add_format(this, format)
        for exported in exports_of(this, format):
            echo(f"{exported.path} ({exported.bytes:,} bytes)")
        checked = {} if format is None else verify_run(this, format, python)
    for name, verification in checked.items():
        echo(f"{name}: {verification.summary()}")
    if not all(verification.passed for verification in checked.values()):
        raise typer.Exit(VERIFICATION_FAILED)
