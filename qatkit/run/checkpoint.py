"""Checkpoints of a stage in training, written durably and verified before they are read; the previous one is kept.

stage/last.ckpt        the newest checkpoint
stage/previous.ckpt    the one before it, in case the newest is corrupt
stage/NAME.ckpt.json   the digests that the file may have: next to ``last.ckpt``, those of both files
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any, TypedDict

import torch

from qatkit.common.files import atomic_path, sha256_of, temporary_path
from qatkit.common.records import read_signed, write_signed
from qatkit.errors import QatkitError, QatkitWarning

NAMES = ("last.ckpt", "previous.ckpt")
"""The files that training resumes from, the newest first."""
SCHEMA = 1
"""Version of ``NAME.ckpt.json``."""


class _Digests(TypedDict):
    """The content of ``NAME.ckpt.json``."""

    sha256: list[str]


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint next to its target, then rename it; the old ``last.ckpt`` becomes ``previous.ckpt``.

    The file and its digest are flushed to disk before the target is replaced, so a valid checkpoint exists even if the
    process is killed at any moment. Lightning writes to TMPDIR and then moves the file, which is not atomic across file
    systems.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        torch.save(content, temporary)
        known = [sha256_of(temporary)]
        if path.name == NAMES[0] and path.exists():
            known += _digests(path)[:2]  # a killed process may have left a digest without its file
            _link(path, path.with_name(NAMES[1]))
        write_signed(_sidecar(path), {"sha256": known}, SCHEMA)


def has_checkpoint(folder: Path) -> bool:
    """Whether a stage has a checkpoint, intact or not."""
    return any((folder / name).is_file() for name in NAMES)


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest intact checkpoint of a stage, or None if the stage has no checkpoint.

    Raises:
        QatkitError: there are checkpoints, but none is intact.
    """
    known = _digests(folder / NAMES[0])
    damaged: list[Path] = []
    for path in (folder / name for name in NAMES):
        if path.is_file():
            if sha256_of(path) in known:
                if damaged:
                    warnings.warn(
                        f"{damaged[0]} is corrupt; resuming from the previous checkpoint, {path}",
                        QatkitWarning,
                        stacklevel=2,
                    )
                return path
            damaged.append(path)
    if damaged:
        raise _damaged(damaged[0])
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU.

    Raises:
        QatkitError: the checkpoint is missing or corrupt.
    """
    if not path.is_file() or sha256_of(path) not in _digests(path):
        raise _damaged(path)
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def delete_checkpoints(folder: Path) -> None:
    """Delete all checkpoints of a stage."""
    for path in folder.glob("*.ckpt*"):
        path.unlink(missing_ok=True)


def _digests(path: Path) -> list[str]:
    try:
        content = read_signed(_sidecar(path), _Digests, SCHEMA, "")
    except (OSError, QatkitError):  # the checkpoint counts as damaged, which is the error that its reader raises
        return []
    return content["sha256"] if content is not None else []


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _link(path: Path, other: Path) -> None:
    """Give a file a second name, in place of another file."""
    temporary = temporary_path(other)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, other)


def _damaged(path: Path) -> QatkitError:
    return QatkitError(
        f"{path} or {_sidecar(path).name} is corrupt or incomplete",
        advice=f"delete {path.parent}, or use --force, to retrain the stage",
    )
