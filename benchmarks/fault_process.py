"""The command line of qatkit in a process that records what it does to a folder, or kills itself on the way.

Started by `fault_runs.py` with a JSON object in the environment variable FAULT:

folder   the folder whose operations count
log      a file for the name of each operation, in order
at       the number of the operation before which the process kills itself; 0 for none
alive    a folder for an empty file named after the id of each process
pages    whether report.html is written, which takes most of the seconds of a small run

Operations are those of the file system (opening a file for writing, creating, renaming, linking and removing, and
fsync) and the calls named in `CALLS`, which lie between the last optimizer step of a stage and its record.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

CALLS = (
    "qatkit.pipeline.training:refuse_non_finite",
    "qatkit.pipeline.training:get_model_state_dict",
    "qatkit.pipeline.stage:finished_model",
    "qatkit.pipeline.stage:save_result",
    "qatkit.pipeline.finishing:evaluate",
    "qatkit.pipeline.finishing:layer_table",
    "qatkit.pipeline.finishing:count_zeros",
    "qatkit.pipeline.finishing:save_stage",
    "qatkit.run.stage_files:write_record",
    "qatkit.pipeline.finishing:delete_checkpoints",
)
_EVENTS = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
_PROCESS = re.compile(r"(?<=\.)\d{2,}(?=\.tmp|/|$)")
"""The id of a process in the name of a temporary file or folder."""


class Operations:
    """Counts the operations on a folder."""

    def __init__(self, folder: str, log: str | None = None, at: int = 0) -> None:
        self._folder = folder
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None
        self._at = at
        self._count = 0

    def seen(self, name: str, path: str = "") -> None:
        """Count an operation, and kill the process before the chosen one."""
        self._count += 1
        if self._log is not None:
            place = _PROCESS.sub("N", os.path.relpath(path, self._folder)) if path else ""
            os.write(self._log, f"{name} {place}".rstrip().encode() + b"\n")
        if self._count == self._at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook of Python, which it calls before each operation."""
        if event not in _EVENTS:
            return
        two = event in ("os.rename", "os.link")
        path, descriptor = arguments[int(two)], arguments[-1] if event in ("os.remove", "os.rmdir") else -1
        if not isinstance(path, str | bytes | os.PathLike):
            return
        name = os.fsdecode(path)
        if event == "open":
            flags = arguments[2] or 0
            # a file that was written by C++ or Rust, which Python does not see, is opened for its fsync
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not name.endswith(".tmp"):
                return
        if not os.path.isabs(name):
            base = os.readlink(f"/proc/self/fd/{descriptor}") if descriptor >= 0 else os.getcwd()
            name = os.path.join(base, name)
        if name.startswith(self._folder):
            self.seen(event, name)

    def watch(self) -> None:
        """Count from now on."""
        fsync = os.fsync

        def counted(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if path.startswith(self._folder):
                self.seen("fsync", path)
            fsync(descriptor)

        os.fsync = counted  # it has no audit event
        for call in CALLS:
            self._watch_call(call)
        sys.addaudithook(self.on_event)

    def _watch_call(self, call: str) -> None:
        module, _, name = call.partition(":")
        owner = importlib.import_module(module)
        function = getattr(owner, name)

        def counted(*args: Any, **named: Any) -> Any:
            self.seen("call", os.path.join(self._folder, name))
            return function(*args, **named)

        setattr(owner, name, counted)


def main() -> None:
    """Prepare the process as FAULT says, then run the command."""
    fault = json.loads(os.environ.get("FAULT", "{}"))
    if "alive" in fault:
        (Path(fault["alive"]) / str(os.getpid())).touch()
    if not fault.get("pages"):
        sys.modules["matplotlib"] = None  # type: ignore[assignment]  # as where it is not installed
    from qatkit.cli.main import main as command

    if "folder" in fault and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        Operations(fault["folder"], fault.get("log"), fault.get("at", 0)).watch()
    command()


if __name__ == "__main__":
    main()
