"""Write to standard output and handle failures such as a closed pipe or a full disk."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import typer

WIDTH = 160
"""Width of a table in characters if the output is not a terminal."""


class OutputError(Exception):
    """Raised when standard output or standard error cannot be written.

    Args:
        error: The underlying error.
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
    """Make standard output and standard error line-buffered, and escape characters that cannot be encoded."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def discard_output() -> None:
    """Discard all further standard output, so that flushing it at exit does not fail again."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # replaced by an object without a file descriptor
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
