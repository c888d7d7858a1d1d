"""SHA-256 digests that link a record to the files it describes."""

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
        base: The folder to which the paths are relative.
    """
    for name, digest in digests.items():
        path = base / name
        if not path.is_file() or file_digest(path) != digest:
            return path
    return None


def visible_files(folder: Path) -> list[Path]:
    """Return the sorted visible files in a folder and its subfolders; links are followed."""
    return _below(folder, frozenset())


def _below(folder: Path, above: frozenset[Path]) -> list[Path]:
    place = folder.resolve()
    if place in above:  # a link to a folder that holds it
        return []
    found = []
    for path in sorted(folder.iterdir()):
        if not path.name.startswith("."):
            found += _below(path, above | {place}) if path.is_dir() else [path]
    return found


def listing_digest(folder: Path) -> str:
    """A hash of the names and sizes of the visible files in a folder and its subfolders; their content is not read."""
    return sizes_digest((path.relative_to(folder).as_posix(), path) for path in visible_files(folder))


def sizes_digest(files: Iterable[tuple[str, Path]], times: bool = False) -> str:
    """A hash of the names and sizes of files, which may be missing; their content is not read.

    Args:
        files: Maps names to files.
        times: Whether to include modification times, which a copy of a file may not preserve.
    """
    listing: list[list[object]] = []
    for name, path in files:
        try:
            status = path.stat()
        except OSError:  # a missing file is noticed where it is read
            listing.append([name])
        else:
            listing.append([name, status.st_size, *([status.st_mtime_ns] if times else [])])
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
