"""The splits that a source has by itself, from files or from the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from qatkit.data.files import is_local, local_files, read_file
from qatkit.data.hub_records import hub_parts
from qatkit.data.source import Part, Record, Source


def open_parts(source: Source) -> dict[str, Part]:
    """The splits that a source has by itself: always "train", and "val" and "test" where they are not to be cut.

    Raises:
        QatkitError: no file matches, a file's type is unknown, or the hub does not give the data set.
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
        split: _local_part(found, source, hashed=split != "train" or not source.streaming)
        for split, found in files.items()
    }


def _local_part(files: list[Path], source: Source, hashed: bool) -> Part:
    def read() -> Iterator[Record]:
        for file in files:
            yield from read_file(file, source.lines)

    # what is read as a stream is not kept, and may be large
    hashes = [_sha256(file) for file in files] if hashed else []
    return Part({"files": hashes, "types": [file.suffix for file in files], "lines": source.lines}, read)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
