"""Where records come from: files here, or a data set of the hub. Every record knows the file and line it stands in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
