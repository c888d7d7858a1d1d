"""Read records with their file and line from JSON Lines, CSV, TSV, Parquet and plain text files."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from qatkit.data.source import BadRecord, Record
from qatkit.errors import QatkitError


def is_local(path: str) -> bool:
    """Whether a path refers to local files rather than to a dataset on the hub."""
    known = Path(path).suffix in READERS
    return known or any(sign in path for sign in "*?[") or path.startswith((".", "~", "/")) or Path(path).exists()


def local_files(pattern: str, argument: str) -> list[Path]:
    """Return the files that match a path or a glob, sorted.

    Args:
        pattern: The path or glob.
        argument: The argument's name in errors.

    Raises:
        QatkitError: no file matches, or a file has an unknown type.
    """
    matches = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    files = [Path(name) for name in matches if Path(name).is_file()]
    if not files:
        is_folder = Path(pattern).expanduser().is_dir()
        raise QatkitError(
            f"'{pattern}' {'is a folder' if is_folder else 'matches no file'}",
            key=argument,
            advice="use the path of an existing file, or a glob such as 'texts/*.jsonl'",
        )
    for file in files:
        if file.suffix not in READERS:
            raise QatkitError(
                f"{file} has an unknown file type", key=argument, advice=f"use one of {', '.join(READERS)}"
            )
    return files


def read_file(file: Path, lines: bool) -> Iterator[Record]:
    """Yield the records of one file."""
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
            except RecursionError:
                record = BadRecord("is JSON that is nested too deeply")
            else:
                if not isinstance(record, dict):
                    record = BadRecord("is not a JSON object", "write one JSON object per line")
            yield f"{file}:{number}", record


def _read_table(file: Path) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # a document may exceed the library's limit of 131,072 characters
    # bytes that are not UTF-8 pass the decoder, so that `_row` can refuse the one record that holds them
    with file.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as opened:
        reader = csv.reader(opened, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        try:
            head = next(filter(None, reader), [])  # skips blank lines
            _refuse_bytes(head)
        except (csv.Error, BadRecord) as error:
            raise QatkitError(
                f"the header is not a valid row ({error})", key=f"{file}:1", advice="fix the header"
            ) from error
        while True:
            first = reader.line_num + 1  # a record may contain line breaks
            try:
                fields = next(reader)
                if fields:
                    yield f"{file}:{first}", _row(head, fields)
            except StopIteration:
                return
            except csv.Error as error:
                last = f", up to line {reader.line_num}" if reader.line_num > first else ""
                yield f"{file}:{first}", BadRecord(f"is not a valid row{last} ({error})")


def _row(head: list[str], fields: list[str]) -> dict[str, str] | BadRecord:
    if len(fields) != len(head):
        return BadRecord(f"has {len(fields)} columns, but the header has {len(head)}")
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
        problem = f"is corrupt after row {number}" if number else "is not a Parquet file, or is corrupt"
        raise QatkitError(
            f"{problem} ({' '.join(str(error).split())})", key=str(file), advice="restore or recreate the file"
        ) from error


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
