"""The lock of a run folder, which allows one process at a time to write to it.

``RUN/run.lock`` is locked by the operating system, which releases the lock when the process ends for any reason. The
file also identifies the holder. Only this entry is used on a file system without locks, and for a holder on another
machine, whose locks may not be visible here.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from qatkit.common.processes import process_exists
from qatkit.common.records import misfit
from qatkit.errors import QatkitError

NAME = "run.lock"
_BUSY = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_held: dict[Path, int] = {}
"""Descriptors of the locks of this process by folder."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as recorded in ``run.lock``."""

    host: str
    boot: str
    """ID of the booted system; it is the same for all containers on a machine, regardless of their host names."""
    pid: int
    started: str
    """Start time, which distinguishes the process from a later process with the same ID; empty if unavailable."""
    since: str
    command: str

    @classmethod
    def this_process(cls) -> Holder:
        """Return the entry for this process."""
        since, command = time.strftime("%Y-%m-%d %H:%M:%S"), shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        return cls(socket.gethostname(), _boot(), os.getpid(), _started(os.getpid()), since, command)

    @property
    def is_local(self) -> bool:
        """Whether the process runs, or ran, on this machine."""
        return self.host == socket.gethostname() or bool(self.boot and self.boot == _boot())

    @property
    def is_alive(self) -> bool:
        """Whether a local process is still running."""
        if self.host != socket.gethostname():  # another container, whose process ids mean nothing here
            return True
        return process_exists(self.pid) and self.started in ("", _started(self.pid))


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, which is created if it does not exist; nested calls in one process share the lock.

    The lock of a process that was killed on this machine is taken over.

    Args:
        folder: The folder.
        wait: Wait until no other process on this machine holds the lock.

    Raises:
        QatkitError: another process holds the lock; the error includes its host and ID.
    """
    key = folder.resolve()
    if key in _held:
        yield
        return
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _wait(folder) if wait else _acquire(folder)
    _held[key] = descriptor
    try:
        yield
    finally:
        if _held.pop(key, None) is not None:  # otherwise this is a forked process, and the lock is not its own
            _release(folder, descriptor)
            with suppress(OSError):  # not empty: something was written
                for path in created:
                    path.rmdir()


def local_holder(folder: Path) -> int | None:
    """Return the ID of the process that holds a folder's lock, if it runs on this host."""
    holder = lock_holder(folder)
    return holder.pid if holder is not None and holder.host == socket.gethostname() else None


def lock_holder(folder: Path) -> Holder | None:
    """Return the process recorded in a folder's lock, which may have ended, or None."""
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return Holder(**content) if misfit(Holder, content) is None else None


def _wait(folder: Path) -> int:
    while True:
        try:
            return _acquire(folder)
        except QatkitError:
            if (holder := lock_holder(folder)) is not None and not holder.is_local:
                raise
            time.sleep(0.1)


def _acquire(folder: Path) -> int:
    path = folder / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            granted = _lock(descriptor)
            if granted is False:
                raise _refusal(folder, _named_holder(folder))
            if not _same_file(descriptor, path):  # its holder removed it after it was opened here
                os.close(descriptor)
                continue
            holder = lock_holder(folder)
            if holder is not None and (not holder.is_local or (granted is None and holder.is_alive)):
                raise _refusal(folder, holder)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(asdict(Holder.this_process())).encode())
            os.fsync(descriptor)
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise
        return descriptor


def _release(folder: Path, descriptor: int) -> None:
    with suppress(OSError):  # Windows does not remove an open file
        (folder / NAME).unlink()
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
    os.close(descriptor)


def _named_holder(folder: Path) -> Holder | None:
    """The holder of a lock that is held; it may not have written its name yet."""
    for _ in range(20):
        if (holder := lock_holder(folder)) is not None:
            return holder
        time.sleep(0.05)
    return None


def _refusal(folder: Path, holder: Holder | None) -> QatkitError:
    if holder is None:
        return QatkitError(
            "another process is using this folder",
            key=str(folder),
            advice="wait until that process ends, or use another --out",
        )
    problem = f"process {holder.pid} on host {holder.host} has used this folder since {holder.since}: {holder.command}"
    if holder.host == socket.gethostname():
        advice = f"wait until that process ends, stop it with `kill {holder.pid}`, or use another --out"
    elif holder.is_local:
        advice = "wait until that process ends, or use another --out"
    else:
        advice = f"wait until that process ends, or use another --out; if it has already ended, delete {folder / NAME}"
    return QatkitError(problem, key=str(folder), advice=advice)


def _lock(descriptor: int) -> bool | None:
    """Lock a file without waiting; False if another process has locked it, None if its file system has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # a byte behind the content, which others must be able to read
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _BUSY else None
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _started(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty where the system does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _forget() -> None:
    """Close the locks in a forked process, which would hold them after this one was killed."""
    for descriptor in _held.values():
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_forget)
