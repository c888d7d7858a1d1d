"""`qatkit verify`."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from qatkit.cli.arguments import Allow, AllowWrite, AsJson, Python, RunArgument
from qatkit.cli.exits import VERIFICATION_FAILED
from qatkit.cli.inputs import open_run, writing
from qatkit.cli.output import echo


def command(
    run: RunArgument,
    python: Python = None,
    allow: Allow = None,
    allow_write: AllowWrite = None,
    as_json: AsJson = False,
) -> None:
    """Run exported files in their runtime and compare them with the trained models.

    Codes, weights and outputs are compared. The exit code is 1 if any file fails verification.

    Example: qatkit verify runs/digits_int4
    """
    this = open_run(run, allow, allow_write)
    from qatkit.pipeline.verify import verify_run

    with writing(this, as_json):
        checked = verify_run(this, python=python)
    if as_json:
        echo(json.dumps({stage: asdict(verification) for stage, verification in checked.items()}))
    for stage, verification in checked.items() if not as_json else ():
        echo(f"{stage}: {verification.summary()}")
    if not all(verification.passed for verification in checked.values()):
        raise typer.Exit(VERIFICATION_FAILED)
