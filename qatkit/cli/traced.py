"""Run and print the trace of `qatkit profile`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qatkit.cli.inputs import check_path_text, load
from qatkit.cli.output import echo, print_table
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.pipeline.tracing import Trace

SHOWN = 12
"""Operators in the table."""


def check_trace(model: str, path: Path | None, stage: str | None) -> None:
    """Raise an error if a trace cannot be made, before anything runs.

    Args:
        model: A recipe, or the folder of a config.
        path: The option --trace.
        stage: The option --stage.

    Raises:
        QatkitError: an option has no effect, the file's name has another ending, or there is no recipe.
    """
    if path is None:
        if stage is not None:
            raise QatkitError("this option has no effect without --trace", key="--stage", advice="remove it")
        return
    check_path_text(path, "--trace")
    if not path.name.endswith((".json", ".json.gz")):
        raise QatkitError(f"'{path.name}' has another ending", key="--trace", advice="use .json or .json.gz")
    if Path(model).is_dir():
        raise QatkitError("a config has no data to train on", key="--trace", advice="pass a recipe, or remove --trace")


def run_trace(recipe: str, overrides: Sequence[str], path: Path, stage: str | None, allow: Sequence[str]) -> Trace:
    """Trace a stage of a recipe; see `qatkit.pipeline.tracing.trace`."""
    import logging

    from qatkit.pipeline.tracing import trace
    from qatkit.pipeline.validation import validate_recipe
    from qatkit.run.folder import Run

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    loaded = load(recipe, list(overrides))
    validate_recipe(loaded, allow)
    return trace(Run(loaded, Path(), allow), path, stage)


def print_trace(traced: Trace, path: Path) -> None:
    """Print the slowest operators, and the time in fake quantization."""
    from rich.table import Table

    of = f" of stage '{traced.stage}'" if traced.stage else ""
    table = Table(title=f"{traced.what}{of} on {traced.device}: {traced.seconds * 1e3:.3g} ms with the profiler")
    for header in ("operator", "calls", "time", "fraction"):
        table.add_column(header, overflow="fold")
    for each in traced.operators[:SHOWN]:
        table.add_row(
            each.name, f"{each.calls:.3g}", f"{each.seconds * 1e3:.3g} ms", f"{each.seconds / traced.busy:.1%}"
        )
    if rest := traced.operators[SHOWN:]:
        spent = sum(each.seconds for each in rest)
        calls = sum(each.calls for each in rest)
        table.add_row(f"{len(rest)} others", f"{calls:.3g}", f"{spent * 1e3:.3g} ms", f"{spent / traced.busy:.1%}")
    print_table(table)
    fake = traced.fake_quantization
    echo(
        f"fake quantization, forward and backward: {fake * 1e3:.3g} ms per step, {fake / traced.busy:.1%} of the "
        f"operators' time"
    )
    echo(f"trace of {traced.steps} steps for chrome://tracing or Perfetto: {path}")
