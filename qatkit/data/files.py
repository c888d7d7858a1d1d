"""Records of files: JSON lines, CSV, TSV, Parquet and plain text, each with the file and line that it stands in."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from qatkit.data.source import BadRecord, Record
from qatkit.errors import QatkitError


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


def read_file(file: Path, lines: bool) -> Iterator[Record]:
    """The records of one file."""
    return _read_lines(file) if lines and file.suffix == ".txt" else READERS[file.suffix](file)


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
