"""A command that only the tests have: it greets, or fails in a given way."""

from __future__ import annotations

import errno
import os
from typing import Annotated

import typer

from qatkit.cli.output import echo
from qatkit.errors import QatkitError

FAILURES: dict[str, BaseException] = {
    "mistake": QatkitError("48 is odd", key="size", advice="use 48.5"),
    "file": PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/etc/shadow"),
    "system": OSError(errno.ENETDOWN, os.strerror(errno.ENETDOWN)),
    "nameless": FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), ""),
    "memory": MemoryError("4 GB"),
    "interrupt": KeyboardInterrupt(),
}


def command(
    name: Annotated[str, typer.Argument(help="Whom to greet.")],
    fail: Annotated[str | None, typer.Option(help="How to fail.")] = None,
) -> None:
    """Greet somebody.

    Example: qatkit greet Ada
    """
    if fail == "bug":
        from qatkit.spec import QuantSpec

        QuantSpec().no_such_name  # type: ignore[attr-defined]  # noqa: B018
    if fail == "qatkit":
        from qatkit.common.tables import implementation

        implementation("qatkit.errors:no_such_name")
    if fail is not None:
        raise FAILURES[fail]
    echo(f"Hello {name}")
