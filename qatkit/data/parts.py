"""The splits that a source provides, from files or from the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from qatkit.common.digests import sizes_digest
from qatkit.common.files import sha256_of
from qatkit.data.files import is_local, local_files, read_file
from qatkit.data.folders import ClassFolders, folder_part
from qatkit.data.hub_records import hub_parts
from qatkit.data.source import FilePath, Part, Record, Source


def open_parts(source: Source, media: Sequence[str] = (), folders: ClassFolders | None = None) -> dict[str, Part]:
    """Return the splits of a source: "train", and "val" and "test" unless they are split off the training records.

    Args:
        source: The records.
        media: Columns with file paths, which are relative to the file that contains the record.
        folders: How files in a folder with one subfolder per class are converted to records. If None, a folder raises
            an error.

    Raises:
        QatkitError: no file matches, a file type is unknown, a folder has subfolders that are not classes, or the hub
            does not provide the dataset.
    """
    if not is_local(source.path):
        return hub_parts(source)
    parts = {}
    for split, path in (("train", source.path), ("val", source.val), ("test", source.test)):
        if path is None:
            continue
        key = "source.path" if split == "train" else f"source.{split}"
        if folders is not None and (folder := Path(path).expanduser()).is_dir():
            parts[split] = folder_part(folder.resolve(), folders, split, key, source.skip_bad)
        else:
            hashed = split != "train" or not source.streaming
            parts[split] = _local_part(local_files(path, key), source, hashed, media)
    return parts


def _local_part(files: list[Path], source: Source, hashed: bool, media: Sequence[str]) -> Part:
    # a stream is not cached, and may be too large to hash
    hashes = [sha256_of(file) for file in files] if hashed else []
    key = {"files": hashes, "types": [file.suffix for file in files], "lines": source.lines}
    if media:  # the cache holds paths of their files, and what was found in them
        paths = [path.resolved() for path in named_files(files, source.lines, media)]
        key["named"] = sizes_digest(((str(path), path) for path in paths), times=True)
    return Part(key, lambda: _records(files, source.lines, media))


def named_files(files: Sequence[Path], lines: bool, media: Sequence[str]) -> list[FilePath]:
    """Return the file paths in media columns of tables; an unchanged table is read only once per process.

    Args:
        files: The tables.
        lines: See `Source.lines`.
        media: The media columns.
    """
    found: list[FilePath] = []
    for file in files:
        status = file.stat()
        found += _named_in(file.resolve(), lines, tuple(media), status.st_mtime_ns, status.st_size, status.st_ino)
    return found


@lru_cache(maxsize=64)
def _named_in(file: Path, lines: bool, media: Sequence[str], *status: int) -> list[FilePath]:
    found: dict[str, FilePath] = {}
    for _, record in _records([file], lines, media):
        for column in media if isinstance(record, dict) else ():
            value = record.get(column)
            if isinstance(value, dict) and not value.get("bytes"):
                value = value.get("path")
            if isinstance(value, FilePath):
                found.setdefault(value, value)
    return list(found.values())


def _records(files: Sequence[Path], lines: bool, media: Sequence[str]) -> Iterator[Record]:
    for file in files:
        for where, record in read_file(file, lines):
            yield where, _with_paths(record, media, file.parent.resolve())


def _with_paths(record: Any, media: Sequence[str], folder: Path) -> Any:
    if isinstance(record, dict):
        for column in media:
            value = record.get(column)
            if isinstance(value, str):
                record[column] = FilePath(value, folder)
            elif isinstance(value, dict) and isinstance(value.get("path"), str):  # as `datasets` stores media
                record[column] = {**value, "path": FilePath(value["path"], folder)}
    return record
