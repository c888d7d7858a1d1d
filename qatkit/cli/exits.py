"""Convert exceptions into an error message without a traceback, and an exit code."""

from __future__ import annotations

import functools
import os
import shlex
import sys
import sysconfig
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import typer

from qatkit.cli.output import OutputError, discard_output, echo
from qatkit.common.termination import CODE, Terminated, termination
from qatkit.errors import QatkitError

VERIFICATION_FAILED = 1
USER_MISTAKE = 2
BUG = 3
INTERRUPTED = 130  # 128 + SIGINT
OUTPUT_CLOSED = 141  # 128 + SIGPIPE
TERMINATED = CODE  # 128 + SIGTERM
CODES = (
    "Exit codes: 0 success; 1 verification failed, or a search broke its promise; 2 error in the recipe, the command "
    "or the environment; 3 bug in qatkit; 130 interrupted (Ctrl-C); 141 output closed; 143 terminated (SIGTERM)."
)


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command so that an exception becomes an error message and an exit code."""

    @functools.wraps(command)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except (Exception, KeyboardInterrupt, Terminated) as error:
            raise typer.Exit(explain(error)) from None

    return call


def explain(error: BaseException) -> int:
    """Print a message for an exception and return the exit code. QATKIT_DEBUG=1 also prints the traceback."""
    if isinstance(error, OutputError):
        discard_output()
        if error.closed:
            return OUTPUT_CLOSED
    if os.environ.get("QATKIT_DEBUG") == "1":
        traceback.print_exception(error)
    code, message = _message(error)
    ending = termination()
    if ending is not None and ending.received and not isinstance(error, KeyboardInterrupt):
        if (
            isinstance(error, Terminated) or code == BUG
        ):  # such as a lost connection to a process that has already ended
            message = ""
        code, message = TERMINATED, "\n".join(filter(None, [message, terminated(ending.saved)]))
    if ending is not None and ending.follows and code in (INTERRUPTED, TERMINATED):
        return code  # rank 0 prints it
    with suppress(OutputError):
        echo(message, err=True)
    return code


def terminated(reason: str) -> str:
    """Return the message of a command that is terminated by SIGTERM.

    Args:
        reason: What was saved, or why nothing was saved; may be empty.
    """
    ending = termination()
    hint = ending.hint() if ending is not None else ""
    return f"terminated by SIGTERM: {'; '.join(filter(None, [reason, hint]))}".removesuffix(": ")


def report_terminated(reason: str) -> None:
    """Print the message of `terminated`."""
    with suppress(OutputError):
        echo(terminated(reason), err=True)


def _message(error: BaseException) -> tuple[int, str]:
    if isinstance(error, KeyboardInterrupt):
        hint = ending.hint() if (ending := termination()) is not None else ""
        return INTERRUPTED, f"interrupted: {hint}".removesuffix(": ")
    if isinstance(error, QatkitError):
        return USER_MISTAKE, f"error: {error}"
    if isinstance(error, OutputError):
        return USER_MISTAKE, f"error: cannot write to standard output: {error}; free disk space or redirect the output"
    if isinstance(error, MemoryError) or _out_of_memory(error):
        return USER_MISTAKE, f"error: out of memory; use a smaller batch_size or a smaller model ({_first_line(error)})"
    if isinstance(error, OSError) and (explained := _os_error(error)):
        return USER_MISTAKE, explained
    if _lost_process(error):
        return USER_MISTAKE, (
            "error: another process of this run has ended or cannot be reached; see its output for the reason. Run "
            f"the same command again to resume ({_first_line(error)})"
        )
    what = f"{type(error).__name__}: {_first_line(error)}" if str(error) else type(error).__name__
    if (place := _users_code(error)) is not None:
        return USER_MISTAKE, f"error: {place} raised {what}; fix that code, or set QATKIT_DEBUG=1 to see the traceback"
    return BUG, (
        f"error: this is a bug in qatkit: {what}\n"
        f"please report it with the recipe and the output of: QATKIT_DEBUG=1 qatkit {shlex.join(sys.argv[1:])}"
    )


def _lost_process(error: BaseException) -> bool:
    """Whether gloo or NCCL lost the connection to another process; neither is imported here."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    return "gloo" in (text := str(error)) and "onnection" in text


def _out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory on a GPU or on the CPU; it is not imported here."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def _os_error(error: OSError) -> str | None:
    """A message for an operating system error, with the path if it is known."""
    reason = error.strerror or _first_line(error)
    if isinstance(error.filename, str | bytes | os.PathLike) and os.fspath(error.filename):
        path = os.fsdecode(error.filename)
        return f"error: {path}: {reason}; check the path, its permissions and the free disk space"
    if isinstance(error, BrokenPipeError) or not reason:  # of a worker process
        return None
    return f"error: {reason}; set QATKIT_DEBUG=1 to see where it happened"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _users_code(error: BaseException) -> str | None:
    """The file and line that raised an exception, unless it is code of qatkit or of an installed package."""
    frames = [(frame.f_globals.get("__name__", ""), frame.f_code.co_filename, line)
              for frame, line in traceback.walk_tb(error.__traceback__)]  # fmt: skip
    installed = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"))
    for module, file, line in reversed(frames):
        if module.partition(".")[0] == "qatkit":
            return None
        if not file.startswith("<") and not any(part in file for part in installed):
            return f"{file}:{line}"
    return None
