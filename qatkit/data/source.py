"""Where records come from: files here, or a data set of the hub. Every record knows the file and line it stands in."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatkit.errors import QatkitError

Record = tuple[str, Any]
"""Where it stands, in words, and its content: a mapping of columns, or a `BadRecord` where it cannot be read."""


class BadRecord(Exception):
    """Why one record cannot be used, and what to do about it."""


@dataclass(frozen=True)
class Source:
    """Records for training, and for validation and test; what has no records of its own is cut from those of training.

    The share of a cut is decided by a hash of each record's content, so that equal records are on one side.

    A blank text has nothing to learn: `causal_text` and `masked_text` pass over it. One that has a class or a partner
    is a record that cannot be used.
    """

    path: str
    """A file or a glob of files (.jsonl, .csv, .tsv, .parquet, .txt), or the name of a data set on the hub."""
    val: str | None = None
    """The same for validation. Of a hub's data set, the name of a split; "validation" where there is one."""
    test: str | None = None
    """The same for the reported numbers. Of a hub's data set, the name of a split; "test" where there is one."""
    subset: str | None = None
    """The configuration of a hub's data set, such as "wikitext-2-raw-v1"."""
    revision: str | None = None
    """Branch, tag or commit of a hub's data set."""
    val_fraction: float = 0.05
    test_fraction: float = 0.05
    lines: bool = False
    """A record per line of a .txt file; by default the file is one record."""
    streaming: bool = False
    """Read training records in their order while training, and keep none of them; for `causal_text`."""
    skip_bad: bool = False
    """Leave out records that cannot be used, and count them, instead of stopping at the first."""

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1 or not 0 < self.test_fraction < 1:
            raise QatkitError(
                f"val_fraction: {self.val_fraction} and test_fraction {self.test_fraction} must be above 0 and below "
                "1; write 0.05 and 0.05"
            )
        if self.val_fraction + self.test_fraction >= 1:
            raise QatkitError("val_fraction: with test_fraction it leaves nothing to train on; write 0.05 and 0.05")


@dataclass(frozen=True)
class Part:
    """The records of one split before any of them are cut off for another."""

    key: dict[str, Any]
    """All that decides the content; plain data."""
    read: Callable[[], Iterator[Record]]


def open_parts(source: Source) -> dict[str, Part]:
    """The splits that a source has by itself: always "train", and "val" and "test" where they are not to be cut.

    Raises:
        QatkitError: no file matches, a file's type is unknown, or the hub does not give the data set.
    """
    if not is_local(source.path):
        from qatkit.data.hub_records import hub_parts

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


def is_local(path: str) -> bool:
    known = Path(path).suffix in READERS
    return known or any(sign in path for sign in "*?[") or path.startswith((".", "~", "/")) or Path(path).exists()


def local_files(pattern: str, argument: str) -> list[Path]:
    """The files that a path or a glob names, in sorted order.

    Raises:
        QatkitError: there is none, or one is of a type that cannot be read.
    """
    found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    files = [Path(name) for name in found if Path(name).is_file()]
    if not files:
        folder = (
            " is a folder; write its files as" if Path(pattern).expanduser().is_dir() else " matches no file; write"
        )
        raise QatkitError(f"{argument}: '{pattern}'{folder} a path such as 'texts/*.jsonl'")
    for file in files:
        if file.suffix not in READERS:
            raise QatkitError(f"{argument}: {file} is of no type that can be read; write one of {', '.join(READERS)}")
    return files


def _local_part(files: list[Path], source: Source, hashed: bool) -> Part:
    def read() -> Iterator[Record]:
        for file in files:
            yield from read_file(file, source.lines)

    # what is read as a stream is not kept, and may be large
    hashes = [_sha256(file) for file in files] if hashed else []
    return Part({"files": hashes, "types": [file.suffix for file in files], "lines": source.lines}, read)


def read_file(file: Path, lines: bool) -> Iterator[Record]:
    """The records of one file."""
    return _read_lines(file) if lines and file.suffix == ".txt" else READERS[file.suffix](file)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def cut(split: str, parts: dict[str, Part], source: Source) -> Iterator[Record]:
    """The records of a split: its own, or the share of the training records that is cut off for it.

    Example:
        >>> part = Part({}, lambda: iter([(f"line {n}", {"text": str(n)}) for n in range(1000)]))
        >>> source = Source("x.jsonl", val_fraction=0.1, test_fraction=0.2)
        >>> [round(len(list(cut(split, {"train": part}, source))), -2) for split in ("train", "val", "test")]
        [700, 100, 200]
    """
    if split in parts and split != "train":
        yield from parts[split].read()
        return
    shares = {"val": source.val_fraction, "test": source.test_fraction}
    for where, record in parts["train"].read():
        place, side = _place(record), "train"
        for name, share in shares.items():
            if name not in parts and place >= 0:
                side, place = (name, -1.0) if place < share else (side, place - share)
        if side == split:
            yield where, record


def _place(record: Any) -> float:
    """A number from 0 to 1 that depends on the content alone; records that cannot be read stay in training."""
    if isinstance(record, BadRecord):
        return 1.0
    content = json.dumps(record, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64


def _read_json_lines(file: Path) -> Iterator[Record]:
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                record = BadRecord(f"is not JSON ({error})")
            else:
                if not isinstance(record, dict):
                    record = BadRecord("is no JSON object; write {...} on every line")
            yield f"{file}:{number}", record


def _read_table(file: Path) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the 131,072 characters that the library allows
    # bytes that are not UTF-8 stay in their own record: decoding stops at none, and `_row` refuses them
    with file.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as opened:
        reader = csv.reader(opened, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        try:
            head = next(filter(None, reader), [])  # blank lines are none
            _refuse_bytes(head)
        except (csv.Error, BadRecord) as error:
            raise QatkitError(f"{file}:1: the head is no row of a table ({error}); write it again") from error
        while True:
            first = reader.line_num + 1  # a record may have line breaks of its own
            try:
                fields = next(reader)
                if fields:
                    yield f"{file}:{first}", _row(head, fields)
            except StopIteration:
                return
            except csv.Error as error:
                last = f", up to line {reader.line_num}" if reader.line_num > first else ""
                yield f"{file}:{first}", BadRecord(f"is no row of a table{last} ({error})")


def _row(head: list[str], fields: list[str]) -> dict[str, str] | BadRecord:
    if len(fields) != len(head):
        return BadRecord(f"has {len(fields)} columns and not the {len(head)} of the head")
    try:
        _refuse_bytes(fields)
    except BadRecord as reason:
        return reason
    return dict(zip(head, fields, strict=True))


def _refuse_bytes(fields: list[str]) -> None:
    try:
        "".join(fields).encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"is not UTF-8 ({error})") from error


def _read_parquet(file: Path) -> Iterator[Record]:
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file}: row {number}", row
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = f"is damaged after row {number}" if number else "is no Parquet file, or a damaged one"
        raise QatkitError(f"{file}: {reason} ({' '.join(str(error).split())}); write it again") from error


def _read_whole(file: Path) -> Iterator[Record]:
    try:
        yield str(file), {"text": file.read_bytes().decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield str(file), BadRecord(f"is not UTF-8 ({error})")


def _read_lines(file: Path) -> Iterator[Record]:
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield f"{file}:{number}", BadRecord(f"is not UTF-8 ({error})")
                continue
            if text:
                yield f"{file}:{number}", {"text": text}


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
    ".txt": _read_whole,
}
