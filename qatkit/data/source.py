"""Sources of records: local files or a data set on the hub. Each record knows its file and line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatkit.errors import QatkitError

Record = tuple[str, Any]
"""A readable location of a record, and its content: a mapping of columns, or a `BadRecord` if it cannot be read."""


class BadRecord(Exception):
    """The reason why one record cannot be used.

    Args:
        problem: What is wrong with it.
        advice: How to fix it; empty if only the record itself can be fixed.
    """

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.advice = advice


def missing(record: Mapping[str, Any], column: str) -> BadRecord:
    """Return the reason why a record without a column cannot be used."""
    return BadRecord(f"has no column '{column}', only {sorted(map(str, record))}")


class FilePath(str):
    """A path as a record gives it, which decides the split of the record, and the folder that it is relative to.

    Args:
        path: The path.
        folder: The folder.
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
    """Records for training, validation and test; a split that is not given is taken from the training records.

    A hash of a record's content determines its split, so equal records are always in the same split.

    `causal_text` and `masked_text` skip blank texts: they cannot be learned from. A blank text with a class or a
    partner is a bad record.
    """

    path: str
    """A file or a glob (.jsonl, .csv, .tsv, .parquet, .txt), or the name of a data set on the hub. For images and
    recordings with one class each, also a folder with one folder per class."""
    val: str | None = None
    """Like `train`, for validation. On the hub, the name of a split; by default "validation" if it exists."""
    test: str | None = None
    """Like `train`, for the reported metrics. On the hub, the name of a split; by default "test"."""
    subset: str | None = None
    """The configuration of a data set on the hub, such as "wikitext-2-raw-v1"."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the hub."""
    val_fraction: float = 0.05
    """Fraction of the training records that is held out for validation."""
    test_fraction: float = 0.05
    """Fraction of the training records that is held out for test."""
    lines: bool = False
    """Make each line of a .txt file a record; by default the whole file is one record."""
    streaming: bool = False
    """Read training records in order during training, without caching them; only for `causal_text`."""
    skip_bad: bool = False
    """Skip and count records that cannot be used instead of stopping at the first one."""

    def __post_init__(self) -> None:
        check_fractions(self.val_fraction, self.test_fraction, example=0.05)


def check_fractions(val: float, test: float, example: float) -> None:
    """Raise unless the training, validation and test splits are all nonempty.

    Args:
        val: Fraction for validation.
        test: Fraction for test.
        example: A fraction that works, for the advice.

    Raises:
        QatkitError: a fraction or the sum of both is out of range.
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
    """The records of one split, before other splits are taken from them."""

    key: dict[str, Any]
    """Plain data that identify the content."""
    read: Callable[[], Iterator[Record]]


def cut(split: str, parts: dict[str, Part], source: Source) -> Iterator[Record]:
    """Yield the records of a split: its own, or its fraction of the training records.

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
