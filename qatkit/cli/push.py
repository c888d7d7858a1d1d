"""`qatkit push`."""

from __future__ import annotations

from typing import Annotated

import typer

from qatkit.cli.arguments import Allow, RunArgument
from qatkit.cli.exported import FormatOption, StageOption, choose
from qatkit.cli.inputs import open_run
from qatkit.cli.output import echo


def command(
    run: RunArgument,
    repository: Annotated[str, typer.Argument(metavar="REPOSITORY", help="OWNER/NAME on the Hugging Face hub.")],
    stage: StageOption = None,
    format: FormatOption = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    allow: Allow = None,
) -> None:
    """Upload a verified file and its model card to the Hugging Face hub.

    A file that failed verification, or that changed after it, is not uploaded. The token is that of `hf auth login`, or
    HF_TOKEN. The repository is created if it does not exist.

    Example: qatkit push runs/int4 me/small-int4 --format gguf
    """
    this = open_run(run, allow, [])
    from qatkit.pipeline.push import push_export

    echo(push_export(this, choose(this, stage, format), repository, private))
