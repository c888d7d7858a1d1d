"""SHA-256 digests that tie a record to the files it describes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(paths: Iterable[Path], base: Path) -> dict[str, str]:
    """The SHA-256 of files, by their path relative to `base`."""
    return {path.relative_to(base).as_posix(): file_digest(path) for path in sorted(paths)}


def changed_file(digests: Mapping[str, str], base: Path) -> Path | None:
    """The first recorded file that is missing or has a different digest; None if all match.

    Args:
        digests: The result of `file_digests`.
        base: The folder that the paths are relative to.
    """
    for name, digest in digests.items():
        path = base / name
        if not path.is_file() or file_digest(path) != digest:
            return path
    return None


def listing_digest(folder: Path) -> str:
    """A hash of the names and sizes of all files in a folder, at any depth; their content is not read."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = [[path.relative_to(folder).as_posix(), path.stat().st_size] for path in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
