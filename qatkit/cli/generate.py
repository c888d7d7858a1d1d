"""`qatkit generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from qatkit.cli.arguments import Allow, Python, RunArgument
from qatkit.cli.inputs import open_run
from qatkit.cli.output import echo
from qatkit.errors import QatkitError, did_you_mean


def command(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The beginning of the text.")],
    stage: Annotated[
        str | None, typer.Option(metavar="STAGE", help="The stage to run.", show_default="the last one")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="The format to run.", show_default="the recipe's first"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, max=2**20, metavar="N", help="The largest number of new tokens.")] = 64,
    python: Python = None,
    allow: Allow = None,
) -> None:
    """Let an exported language model continue a text in its runtime.

    Each token is the most probable one, so the same file always writes the same text. GGUF files are run by
    transformers, not by llama.cpp.

    Example: qatkit generate runs/int4 --prompt "Once upon a time"
    """
    this = open_run(run, allow, [])
    from qatkit.export.generation import generate
    from qatkit.run.exports import exports_of

    exports = exports_of(this)
    name, main = stage or this.rows[-1], format or exports[0].format.name
    if name not in this.rows:
        raise QatkitError(f"unknown stage '{name}'", key="--stage", advice=did_you_mean(name, this.rows))
    found = next((each for each in exports if (each.stage, each.format.name) == (name, main)), None)
    if found is None:
        formats = list(dict.fromkeys(each.format.name for each in exports))
        raise QatkitError(
            f"the run has no '{main}' files", key="--format",
            advice=f"use {' or '.join(formats)}, or run `qatkit export {run} --format {main}`",
        )  # fmt: skip
    if not found.path.exists():
        raise QatkitError("there is no such file or folder", key=str(found.path), advice=f"run `qatkit export {run}`")
    echo(prompt, nl=False)
    for piece in generate(found.format, found.path, prompt, tokens, python):
        echo(piece, nl=False)
    echo()
