"""Write files atomically, and detect files that have changed since they were written."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

_FAILED_WRITES = ("inline_container.cc", "PytorchStreamWriter", "Error while serializing: I/O error", "iostream error")
"""Phrases in the errors of torch, safetensors and OpenVINO if a file cannot be written; these errors are not OSErrors.
"""
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def temporary_path(path: Path) -> Path:
    """A hidden path next to `path` for a file or folder that will replace it; its name contains the process ID.

    Example:
        >>> temporary_path(Path("runs/model.onnx")).name == f".model.onnx.{os.getpid()}.tmp"
        True
    """
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_temporary(folder: Path, exclude: Iterable[str] = ()) -> list[Path]:
    """Remove the temporary files and folders that killed processes left in a folder and its subfolders.

    The caller must hold a lock, so that no other process is writing there.

    Args:
        folder: The folder.
        exclude: Names of subfolders to leave alone.

    Returns:
        The removed paths.
    """
    found = []
    for parent, folders, files in os.walk(folder):
        found += [Path(parent, name) for name in (*folders, *files) if _TEMPORARY.fullmatch(name)]
        folders[:] = [name for name in folders if name not in exclude and not _TEMPORARY.fullmatch(name)]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return found


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; if the block ends without an error, the file there replaces `path`.

    The file is flushed to disk before the rename and the folder after it, so even a power failure does not leave a
    partial file.
    """
    temporary = temporary_path(path)
    with naming(path):
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield a new temporary folder; if the block ends without an error, it replaces `folder` with all of its files.

    All files are flushed to disk before. A folder cannot be replaced in a single step: if the process is killed between
    the two renames, there is no folder with this name, but never one with only some of the files. If the second rename
    fails, the old folder gets its name back. If `folder` is a link, the folder that it points to is replaced.
    """
    folder = folder.resolve()
    temporary, replaced = temporary_path(folder), temporary_path(folder.with_name(f"{folder.name}.replaced"))
    try:
        with naming(folder):
            temporary.mkdir(parents=True)
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                if path.is_dir():
                    fsync_folder(path)
                elif path.is_file():
                    with path.open("rb") as opened:
                        os.fsync(opened.fileno())
            if folder.exists():
                folder.rename(replaced)
            try:
                temporary.rename(folder)
            except BaseException:
                if replaced.exists():
                    replaced.rename(folder)
                raise
            fsync_folder(folder.parent)
            shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError in the block that has none, such as from a write to a full disk.

    Raises:
        OSError: the same error, with a path.
    """
    try:
        yield
    except OSError as error:
        if error.filename and not os.fspath(error.filename).endswith(".tmp"):
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    except Exception as error:
        if any(words in str(error) for words in _FAILED_WRITES):
            reason = str(error).strip().splitlines()[0]
            raise OSError(errno.EIO, f"the file cannot be written ({reason})", str(path)) from error
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a text file as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def fsync_folder(folder: Path) -> None:
    """Flush a folder to disk to make renames in it durable, if the system supports this."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows does not support it
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 digest of a file; an unchanged file is read only once per process."""
    status = path.stat()
    return _sha256_of(path, status.st_mtime_ns, status.st_size, status.st_ino)


@lru_cache(maxsize=1024)
def _sha256_of(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
