"""`qatkit verify`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from qatkit.cli.arguments import Allow, AllowWrite, AsJson, Python, RunArgument
from qatkit.cli.exits import VERIFICATION_FAILED
from qatkit.cli.inputs import open_run, writing
from qatkit.cli.output import echo

if TYPE_CHECKING:
    from qatkit.export.explanation import Explanation
    from qatkit.export.verification import Verification


def command(
    run: RunArgument,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also compare the files layer by layer, and name the first difference.")
    ] = False,
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
        if explain:
            from qatkit.pipeline.explain import explain_run

            explained = explain_run(this)
    present_verifications(checked, False, as_json, explained if explain else {})
    if not all(verification.passed for verification in checked.values()):
        raise typer.Exit(VERIFICATION_FAILED)


def present_verifications(
    checked: Mapping[str, Verification],
    quiet: bool,
    as_json: bool,
    explained: Mapping[str, Explanation] | None = None,
) -> None:
    """Print verifications by name.

    Args:
        checked: The verification of each file.
        quiet: Print nothing, unless `as_json` is set.
        as_json: Print them as JSON.
        explained: The comparison by layer of each file, if there is one.
    """
    explained = explained or {}
    if as_json:
        fields = {name: asdict(verification) for name, verification in checked.items()}
        for name, explanation in explained.items():
            fields[name]["explanation"] = asdict(explanation)
        echo(json.dumps(fields))
    elif not quiet:
        for name, verification in checked.items():
            echo(f"{name}: {verification.summary()}")
            if name in explained:
                echo(f"{name}: layer by layer, {explained[name].text}")
