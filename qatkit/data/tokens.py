"""Encode records once into the user's cache, and memory-map them from there.

split/NAME.bin    one value per token ("input_ids", "trained") or per record ("labels"), record after record
split/ends.bin    the end of each record, in tokens (or bytes of an image, or values of a table)
meta.json         dtypes, and the counts of used and skipped records
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from qatkit.common.records import read_signed, write_signed
from qatkit.data.folders import ClassFolders
from qatkit.data.parts import open_parts
from qatkit.data.source import BadRecord, Part, Record, Source, cut
from qatkit.data.text import SPLITS, cached_folder
from qatkit.data.tokenizers import fingerprint
from qatkit.errors import QatkitError, QatkitWarning

CHUNK = 500
"""Records per tokenizer call; the tokenizer uses multiple threads."""

Row = dict[str, Any]
"""An encoded record: lists or arrays with one number per token, and scalars for the whole record."""
Encoded = list[Row] | BadRecord
"""The rows of one record, or the reason why it cannot be used; empty if the record has no training signal."""
Encode = Callable[[Sequence[Mapping[str, Any]]], Sequence[Encoded]]
SCHEMA = 1
"""Version of ``meta.json``."""


class _Meta(TypedDict):
    """The content of ``meta.json``."""

    records: dict[str, int]
    bad: int
    first_bad: str | None
    dtypes: dict[str, str]
    per_record: list[str]


class Rows:
    """The records of a split in the cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = _read_meta(folder.parent)
        self._dtypes: dict[str, str] = meta["dtypes"]
        self._per_record: list[str] = meta["per_record"]

    def __len__(self) -> int:
        return len(self.ends)

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """The end offset of each record in the token stream, ``[records]``."""
        return np.fromfile(self.folder / "ends.bin", np.int64)

    @cached_property
    def streams(self) -> dict[str, NDArray[Any]]:
        """All arrays, memory-mapped."""
        return {
            name: np.memmap(path, dtype, "r") if (path := self.folder / f"{name}.bin").stat().st_size else np.empty(0)
            for name, dtype in self._dtypes.items()
        }

    def row(self, index: int) -> dict[str, NDArray[Any]]:
        """Return one record: arrays ``[tokens]`` and scalars."""
        start, end = int(self.ends[index - 1]) if index else 0, int(self.ends[index])
        return {
            name: array[index] if name in self._per_record else array[start:end] for name, array in self.streams.items()
        }


def prepare(
    source: Source,
    tokenizer: Any,
    options: dict[str, Any],
    encode: Encode,
    media: Sequence[str] = (),
    folders: ClassFolders | None = None,
) -> Path:
    """Return the cache folder with the rows of all splits (only validation and test for a stream); create it if needed.

    Args:
        source: The records.
        tokenizer: The tokenizer of `encode`; None if the records are not text.
        options: Everything else that determines the content, as plain data.
        encode: Encodes records as rows; a record that cannot be used becomes a `BadRecord` with the reason.
        media: Columns with file paths; see `open_parts`.
        folders: See `open_parts`.

    Raises:
        QatkitError: a record cannot be used and `source.skip_bad` is false, or a split would be empty.
    """
    parts = open_parts(source, media, folders)
    key = {
        "parts": {split: part.key for split, part in parts.items()},
        "shares": [source.val_fraction, source.test_fraction],
        "skip_bad": source.skip_bad,
        "streaming": source.streaming,
        "tokenizer": None if tokenizer is None else fingerprint(tokenizer),
        "options": options,
        "layout": 4,
    }
    if source.streaming:
        for split in ("val", "test"):
            if split not in parts:
                raise QatkitError(
                    "is not set, and a stream cannot be split by fraction",
                    key=f"source.{split}",
                    advice="set it to a file or to a split of the dataset",
                )
    folder = cached_folder(key, lambda empty: _write(empty, parts, source, tokenizer, encode))
    meta = _read_meta(folder)
    if meta["bad"]:
        warnings.warn(
            f"source.skip_bad: skipped {meta['bad']} of {meta['bad'] + sum(meta['records'].values())} records; first: "
            f"{meta['first_bad']}",
            QatkitWarning,
            stacklevel=2,
        )
    return folder


def rows_of(records: Iterable[Record], encode: Encode) -> Iterator[tuple[str, Encoded]]:
    """Encode records in chunks, and yield each result in order with the location of its record."""
    records = iter(records)
    while chunk := list(islice(records, CHUNK)):
        encoded = iter(encode([record for _, record in chunk if not isinstance(record, BadRecord)]))
        for where, record in chunk:
            yield where, record if isinstance(record, BadRecord) else next(encoded)


def refuse(where: str, reason: BadRecord) -> QatkitError:
    """Return the error for a record that cannot be used."""
    advice = f"{reason.advice or 'fix the record'}, or set source.skip_bad: true to skip such records"
    return QatkitError(reason.problem, key=where, advice=advice)


def refuse_stream(source: Source) -> None:
    """Raise an error if the source is streamed, which is supported only for plain text.

    Raises:
        QatkitError: `source.streaming` is on.
    """
    if source.streaming:
        raise QatkitError(
            "only qatkit.data:causal_text supports it", key="source.streaming", advice="set streaming: false"
        )


def _write(folder: Path, parts: dict[str, Part], source: Source, tokenizer: Any, encode: Encode) -> None:
    meta: dict[str, Any] = {"records": {}, "bad": 0, "first_bad": None, "dtypes": {}, "per_record": []}
    for split in SPLITS[1:] if source.streaming else SPLITS:
        (folder / split).mkdir()
        ends, total = [], 0
        with ExitStack() as opened:
            files: dict[str, IO[bytes]] = {}
            for where, rows in rows_of(cut(split, parts, source), encode):
                if isinstance(rows, BadRecord):
                    if not source.skip_bad:
                        raise refuse(where, rows)
                    meta["bad"] += 1
                    meta["first_bad"] = meta["first_bad"] or f"{where}: {rows}"
                    continue
                for row in rows:
                    for name, values in row.items():
                        if name not in files:
                            files[name] = opened.enter_context((folder / split / f"{name}.bin").open("wb"))
                            meta["dtypes"][name] = _dtype(name, values, tokenizer)
                            if not isinstance(values, list | np.ndarray) and name not in meta["per_record"]:
                                meta["per_record"].append(name)
                        np.asarray(values, meta["dtypes"][name]).tofile(files[name])
                    total += next(len(values) for values in row.values() if isinstance(values, list | np.ndarray))
                    ends.append(total)
                meta["records"][split] = meta["records"].get(split, 0) + 1
        if not ends:
            raise _empty(split, split in parts, meta, source)
        np.asarray(ends, np.int64).tofile(folder / split / "ends.bin")
    write_signed(folder / "meta.json", meta, SCHEMA)


def _read_meta(folder: Path) -> dict[str, Any]:
    """Read ``meta.json`` of a cached folder.

    Raises:
        QatkitError: it is missing or damaged.
    """
    advice = f"delete {folder} to create it again"
    meta = read_signed(folder / "meta.json", _Meta, SCHEMA, advice)
    if meta is None:
        raise QatkitError(f"{folder} has no meta.json", key="cached data", advice=advice)
    return meta


def _dtype(name: str, values: Any, tokenizer: Any) -> str:
    if isinstance(values, np.ndarray):
        return str(values.dtype)
    if name == "input_ids":
        return "uint16" if len(tokenizer) <= 2**16 else "uint32"
    return "int64" if name == "labels" else "uint8"


def _empty(split: str, own: bool, meta: dict[str, Any], source: Source) -> QatkitError:
    if own:
        skipped = f"; all {meta['bad']} were skipped; first: {meta['first_bad']}" if meta["bad"] else ""
        name = "path" if split == "train" else split
        return QatkitError(
            f"there is no valid record{skipped}",
            key=f"source.{name}",
            advice="use a file or dataset with valid records",
        )
    return QatkitError(
        f"{getattr(source, f'{split}_fraction')} of the records leaves no record for {split}",
        key=f"source.{split}_fraction",
        advice=f"use a larger fraction, or set source.{split} to other records",
    )
