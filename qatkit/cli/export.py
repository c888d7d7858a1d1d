"""`qatkit export`."""

from __future__ import annotations

from qatkit.cli.arguments import Allow, AllowWrite, RunArgument
from qatkit.cli.inputs import open_run, writing
from qatkit.cli.output import echo


def command(run: RunArgument, allow: Allow = None, allow_write: AllowWrite = None) -> None:
    """Export a run's finished stages.

    The recipe's `export` block sets the format.

    Example: qatkit export runs/digits_int4
    """
    this = open_run(run, allow, allow_write)
    from qatkit.pipeline.export import export_run, format_of

    with writing(this):
        paths = export_run(this)
    for path in paths:
        echo(f"{path} ({format_of(this).size(path):,} bytes)")
