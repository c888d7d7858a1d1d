"""Sources of records: local files or a dataset on the hub. Each record has a readable location."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatkit.errors import QatkitError

Record = tuple[str, Any]
"""The readable location of a record, and its content: a mapping of columns, or a `BadRecord` if it cannot be read."""


class BadRecord(Exception):
    """The reason why one record cannot be used.

    Args:
        problem: The problem with the record.
        advice: How to fix it; empty if only the record itself can be fixed.
    """

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.advice = advice


def missing(record: Mapping[str, Any], column: str) -> BadRecord:
    """Return the reason why a record without a column cannot be used."""
    return BadRecord(f"has no column '{column}'; its columns are {sorted(map(str, record))}")


class FilePath(str):
    """A path from a record, and the folder that it is relative to; the path determines the split of the record.

    Args:
        path: The path in the record.
        folder: The folder that it is relative to.
    """

    folder: Path

    def __new__(cls, path: str, folder: Path) -> FilePath:
        made = super().__new__(cls, path)
        made.folder = folder
        return made

    def resolved(self) -> Path:
        """The path to open."""
        return self.folder / self


@dataclass(frozen=True)
class Source:
    """Records for training, validation and test; a split that is not set is split off the training records.

    A hash of a record's content determines its split, so equal records are always in the same split.

    `causal_text` and `masked_text` skip blank text, which has no training signal. For data with labels or text pairs, a
    record with blank text is a bad record.
    """

    path: str
    """A file or a glob (.jsonl, .csv, .tsv, .parquet, .txt), or the name of a dataset on the hub. For image and audio
    classification, a folder with one subfolder per class is supported too.
    """
    val: str | None = None
    """Like `train`, for validation. On the hub, the name of a split; the default is "validation" if it exists."""
    test: str | None = None
    """Like `train`, for the reported metrics. On the hub, the name of a split; the default is "test" if it exists."""
    subset: str | None = None
    """The configuration of a dataset on the hub, such as "wikitext-2-raw-v1"."""
    revision: str | None = None
    """Branch, tag or commit of a dataset on the hub."""
    val_fraction: float = 0.05
    """Fraction of the training records that is held out for validation."""
    test_fraction: float = 0.05
    """Fraction of the training records that is held out for test."""
    lines: bool = False
    """Treat each line of a .txt file as a record; by default, the whole file is one record."""
    streaming: bool = False
    """Read training records in order during training, without caching them; only for `causal_text`."""
    skip_bad: bool = False
    """Skip and count records that cannot be used instead of stopping at the first one."""

    def __post_init__(self) -> None:
        check_fractions(self.val_fraction, self.test_fraction, example=0.05)


def check_fractions(val: float, test: float, example: float) -> None:
    """Raise an error unless the fractions leave data for training, validation and test.

    Args:
        val: Fraction for validation.
        test: Fraction for test.
        example: A valid fraction, for the advice in errors.

    Raises:
        QatkitError: a fraction or the sum of both fractions is out of range.
    """
    advice = f"set val_fraction: {example} and test_fraction: {example}"
    for key, value in (("val_fraction", val), ("test_fraction", test)):
        if not 0 < value < 1:
            raise QatkitError(f"{value} is not between 0 and 1", key=key, advice=advice)
    if val + test >= 1:
        problem = f"{val} and test_fraction {test} leave nothing to train on"
        raise QatkitError(problem, key="val_fraction", advice=advice)


@dataclass(frozen=True)
class Part:
    """The records of one part of a source, before validation and test splits are taken from it."""

    key: dict[str, Any]
    """Plain data that identifies the content."""
    read: Callable[[], Iterator[Record]]


def cut(split: str, parts: dict[str, Part], source: Source) -> Iterator[Record]:
    """Yield the records of a split, either its own or its fraction of the training records.

    Example:
        >>> part = Part({}, lambda: iter([(f"line {n}", {"text": str(n)}) for n in range(1000)]))
        >>> source = Source("x.jsonl", val_fraction=0.1, test_fraction=0.2)
        >>> [round(len(list(cut(split, {"train": part}, source))), -2) for split in ("train", "val", "test")]
        [700, 100, 200]
    """
    if split in parts and split != "train":
        yield from parts[split].read()
        return
    fractions = {"val": source.val_fraction, "test": source.test_fraction}
    for where, record in parts["train"].read():
        position, side = _position(record), "train"
        for name, fraction in fractions.items():
            if name not in parts and position >= 0:
                side, position = (name, -1.0) if position < fraction else (side, position - fraction)
        if side == split:
            yield where, record


def _position(record: Any) -> float:
    """Map a record's content to a number from 0 to 1; records that cannot be read stay in training."""
    if isinstance(record, BadRecord):
        return 1.0
    content = json.dumps(record, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64
