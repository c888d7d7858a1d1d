"""The splits that a source provides, from files or from the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qatkit.common.digests import listing_digest
from qatkit.data.files import is_local, local_files, read_file
from qatkit.data.hub_records import hub_parts
from qatkit.data.source import FilePath, Part, Record, Source
from qatkit.errors import QatkitError


def open_parts(source: Source, media: Sequence[str] = (), folder_label: str | None = None) -> dict[str, Part]:
    """Return the splits of a source: always "train", and "val" and "test" unless they are taken from it.

    Args:
        source: The records.
        media: Columns with paths of files, which are relative to the file that names them.
        folder_label: The column for the class of files in a folder with one folder per class, whose paths are in the
            first column of `media`; None refuses folders.

    Raises:
        QatkitError: no file matches, a file type is unknown, or the hub does not provide the data set.
    """
    if not is_local(source.path):
        return hub_parts(source)
    parts = {}
    for split, path in (("train", source.path), ("val", source.val), ("test", source.test)):
        if path is None:
            continue
        key = "source.path" if split == "train" else f"source.{split}"
        if folder_label is not None and (folder := Path(path).expanduser()).is_dir():
            parts[split] = _folder_part(folder.resolve(), media[0], folder_label, key)
        else:
            hashed = split != "train" or not source.streaming
            parts[split] = _local_part(local_files(path, key), source, hashed, media)
    return parts


def _folder_part(folder: Path, column: str, label: str, key: str) -> Part:
    if not files_of(folder):
        raise QatkitError(
            f"'{folder}' has no folder with files", key=key, advice="put the files of each class in a folder of its own"
        )
    return Part(
        {"folder": str(folder), "listing": listing_digest(folder)}, lambda: folder_records(folder, column, label)
    )


def _local_part(files: list[Path], source: Source, hashed: bool, media: Sequence[str]) -> Part:
    def read() -> Iterator[Record]:
        for file in files:
            for where, record in read_file(file, source.lines):
                yield where, _with_paths(record, media, file.parent.resolve())

    # a stream is not cached, and may be too large to hash
    hashes = [_sha256(file) for file in files] if hashed else []
    key = {"files": hashes, "types": [file.suffix for file in files], "lines": source.lines}
    if media:
        key["folders"] = [str(file.parent.resolve()) for file in files]  # the cache holds paths of their files
    return Part(key, read)


def _with_paths(record: Any, media: Sequence[str], folder: Path) -> Any:
    if isinstance(record, dict):
        for column in media:
            value = record.get(column)
            if isinstance(value, str):
                record[column] = FilePath(value, folder)
            elif isinstance(value, dict) and isinstance(value.get("path"), str):  # as `datasets` stores media
                record[column] = {**value, "path": FilePath(value["path"], folder)}
    return record


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def folder_records(folder: Path, column: str, label: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield one record per file in the folders of the classes, with its path and the name of its folder.

    Args:
        folder: A folder with one folder per class.
        column: The column of the path.
        label: The column of the class.
    """
    for path in files_of(folder):
        name = path.relative_to(folder).parts[0]
        yield str(path), {column: FilePath(str(path.relative_to(folder)), folder), label: name}


def files_of(folder: Path) -> list[Path]:
    """The files in the folders of the classes, sorted; hidden ones do not count."""
    inside = (path for each in class_folders(folder) for path in (folder / each).rglob("*"))
    return sorted(path for path in inside if path.is_file() and not path.name.startswith("."))


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted; hidden ones do not count."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
