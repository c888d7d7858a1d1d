"""Writing to standard output, and handling its failures: a closed pipe, a full disk."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import typer

WIDTH = 160
"""Columns of a table when the output is not a terminal."""


class OutputError(Exception):
    """Standard output or standard error cannot be written.

    Args:
        error: The failure.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error))
        self.closed = error.errno in (errno.EPIPE, errno.EINVAL)  # Windows reports a closed pipe as EINVAL


def echo(text: str = "", err: bool = False, nl: bool = True) -> None:
    """Print text and flush it.

    Raises:
        OutputError: the stream cannot be written.
    """
    try:
        typer.echo(text, err=err, nl=nl)
    except OSError as error:
        raise OutputError(error) from error


def print_table(table: Any) -> None:
    """Print a `rich` table, with colors if standard output is a terminal."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    with console.capture() as captured:
        console.print(table)
    echo(captured.get(), nl=False)


def prepare_streams() -> None:
    """Write log lines immediately instead of buffering, with escapes for characters that cannot be encoded."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def discard_output() -> None:
    """Discard the rest of standard output, so that Python does not fail on it again at exit."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # replaced by something without one
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
