"""`qatkit generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from qatkit.cli.arguments import Allow, Python, RunArgument
from qatkit.cli.exported import FormatOption, StageOption, choose
from qatkit.cli.inputs import open_run
from qatkit.cli.output import echo


def command(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The beginning of the text.")],
    stage: StageOption = None,
    format: FormatOption = None,
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

    found = choose(this, stage, format)
    echo(prompt, nl=False)
    for piece in generate(found.format, found.path, prompt, tokens, python):
        echo(piece, nl=False)
    echo()
