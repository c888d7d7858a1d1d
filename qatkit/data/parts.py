"""The splits that a source provides, from files or from the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from qatkit.data.files import is_local, local_files, read_file
from qatkit.data.hub_records import hub_parts
from qatkit.data.source import Part, Record, Source


def open_parts(source: Source, media: Sequence[str] = ()) -> dict[str, Part]:
    """Return the splits of a source: always "train", and "val" and "test" unless they are taken from it.

    Raises:
        QatkitError: no file matches, a file type is unknown, or the hub does not provide the data set.
    """
    if not is_local(source.path):
        return hub_parts(source)
    given = {"train": source.path, "val": source.val, "test": source.test}
    files = {
        split: local_files(path, "source.path" if split == "train" else f"source.{split}")
        for split, path in given.items()
        if path is not None
    }
    return {
        split: _local_part(paths, source, hashed=split != "train" or not source.streaming)
        for split, paths in files.items()
    }


def _local_part(files: list[Path], source: Source, hashed: bool) -> Part:
    def read() -> Iterator[Record]:
        for file in files:
            yield from read_file(file, source.lines)

    # a stream is not cached, and may be too large to hash
    hashes = [_sha256(file) for file in files] if hashed else []
    return Part({"files": hashes, "types": [file.suffix for file in files], "lines": source.lines}, read)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
