"""Records as tokens on disk: written once in the user's cache, read without being loaded.

split/NAME.bin    a value per token ("input_ids", "trained") or per record ("labels"), one record after the other
split/ends.bin    where each record ends, in tokens
meta.json         dtypes, how many records there are and how many were left out, the names of classes
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from qatkit.data.datamodule import Collate, SplitDataModule
from qatkit.data.parts import open_parts
from qatkit.data.source import BadRecord, Part, Record, Source, cut
from qatkit.data.text import SPLITS, cached_folder
from qatkit.data.tokenizers import fingerprint, padding_id
from qatkit.errors import QatkitError, QatkitWarning

CHUNK = 500
"""Records that are tokenized at once, by as many threads as the tokenizer takes."""

Row = dict[str, Any]
"""A record in numbers: lists with a number per token, and plain numbers for the record."""
Encoded = list[Row] | BadRecord
"""What becomes of a record; no row, where it has nothing to learn."""
Encode = Callable[[Sequence[Mapping[str, Any]]], Sequence[Encoded]]


class Rows:
    """The records of a split, as `prepare` wrote them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = json.loads((folder.parent / "meta.json").read_text(encoding="utf-8"))
        self._dtypes: dict[str, str] = meta["dtypes"]
        self._per_record: list[str] = meta["per_record"]

    def __len__(self) -> int:
        return len(self.ends)

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Where each record ends in the stream of tokens, ``[records]``."""
        return np.fromfile(self.folder / "ends.bin", np.int64)

    @cached_property
    def streams(self) -> dict[str, NDArray[Any]]:
        """Every array, mapped into memory."""
        return {
            name: np.memmap(path, dtype, "r") if (path := self.folder / f"{name}.bin").stat().st_size else np.empty(0)
            for name, dtype in self._dtypes.items()
        }

    def row(self, index: int) -> dict[str, NDArray[Any]]:
        """One record's arrays, ``[tokens]``, and its numbers, 0-d."""
        start, end = int(self.ends[index - 1]) if index else 0, int(self.ends[index])
        return {
            name: array[index] if name in self._per_record else array[start:end] for name, array in self.streams.items()
        }


def prepare(source: Source, tokenizer: Any, options: dict[str, Any], encode: Encode) -> Path:
    """The cached folder with the tokens of all splits, made on first use; of a stream those of validation and test.

    Args:
        source: Where the records come from.
        tokenizer: What makes tokens of them.
        options: All else that decides the content; plain data.
        encode: Makes rows of records; in the place of one that cannot be used, a `BadRecord` with the reason.

    Raises:
        QatkitError: a record cannot be used and `source.skip_bad` is off, or a split is left without one.
    """
    parts = open_parts(source)
    key = {
        "parts": {split: part.key for split, part in parts.items()},
        "shares": [source.val_fraction, source.test_fraction],
        "skip_bad": source.skip_bad,
        "streaming": source.streaming,
        "tokenizer": fingerprint(tokenizer),
        "options": options,
        "layout": 2,
    }
    if source.streaming:
        for split in ("val", "test"):
            if split not in parts:
                raise QatkitError(
                    f"source.{split}: is missing, and nothing can be cut off a stream; write a file or split"
                )
    folder = cached_folder(key, lambda empty: _write(empty, parts, source, tokenizer, encode))
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta["bad"]:
        warnings.warn(
            f"source.skip_bad: {meta['bad']} of {meta['bad'] + sum(meta['records'].values())} records were left out, "
            f"the first: {meta['first_bad']}",
            QatkitWarning,
            stacklevel=2,
        )
    return folder


def rows_of(records: Iterable[Record], encode: Encode) -> Iterator[tuple[str, Encoded]]:
    """Records encoded a chunk at a time, in order, each beside the place where it stands."""
    records = iter(records)
    while chunk := list(islice(records, CHUNK)):
        encoded = iter(encode([record for _, record in chunk if not isinstance(record, BadRecord)]))
        for where, record in chunk:
            yield where, record if isinstance(record, BadRecord) else next(encoded)


def refuse(where: str, reason: BadRecord) -> QatkitError:
    """The error for a record that cannot be used."""
    return QatkitError(f"{where}: {reason}; mend the record, or write source.skip_bad: true to leave such records out")


def refuse_stream(source: Source) -> None:
    """Only plain text can be read as a stream.

    Raises:
        QatkitError: the source is to be streamed.
    """
    if source.streaming:
        raise QatkitError("source.streaming: only qatkit.data:causal_text reads a stream; write streaming: false")


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
                            meta["dtypes"][name] = _dtype(name, len(tokenizer))
                            if not isinstance(values, list) and name not in meta["per_record"]:
                                meta["per_record"].append(name)
                        np.asarray(values, meta["dtypes"][name]).tofile(files[name])
                    total += len(row["input_ids"])
                    ends.append(total)
                meta["records"][split] = meta["records"].get(split, 0) + 1
        if not ends:
            raise _empty(split, split in parts, meta, source)
        np.asarray(ends, np.int64).tofile(folder / split / "ends.bin")
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _dtype(name: str, vocabulary: int) -> str:
    if name == "input_ids":
        return "uint16" if vocabulary <= 2**16 else "uint32"
    return "int64" if name == "labels" else "uint8"


def _empty(split: str, own: bool, meta: dict[str, Any], source: Source) -> QatkitError:
    if own:
        said = f", and all {meta['bad']} were left out; the first: {meta['first_bad']}" if meta["bad"] else ""
        name = "path" if split == "train" else split
        return QatkitError(f"source.{name}: there is no record to use{said}; write another")
    return QatkitError(
        f"source.{split}_fraction: {getattr(source, f'{split}_fraction')} of the records leaves none for {split}; "
        f"write more, or source.{split} with records of its own"
    )


class TokenDataModule(SplitDataModule):
    """Splits of a folder that `prepare` wrote.

    Args:
        folder: Gives the folder, and makes it where it does not exist yet.
        tokenizer: Gives what makes tokens of text.
        dataset: Makes a data set of something that opens a split, and the split's name.
        context: Tokens of a sample at most.
        packed: Whether samples are windows of several documents.
        batch_size: Samples per device and step.
        seed: Decides the training order.
        epoch_batches: Batches between two validations and checkpoints.
        collate: Makes a batch of samples.
        task: Name of a row of `qatkit.tasks.TASKS`.

    Raises:
        QatkitError: `epoch_batches` is out of range.
    """

    def __init__(
        self,
        folder: Callable[[], Path],
        tokenizer: Callable[[], Any],
        dataset: Callable[[Callable[[], Rows], str], Dataset[Any]],
        context: int,
        batch_size: int,
        seed: int,
        epoch_batches: int,
        packed: bool = False,
        collate: Collate | None = None,
        task: str = "causal",
    ) -> None:
        if epoch_batches < 1:
            raise QatkitError(f"epoch_batches: {epoch_batches} is out of range; write a whole number of at least 1")
        self._folder = folder
        self._tokenizer = tokenizer
        self._made: Path | None = None
        train, val, test = (dataset(partial(self._rows, split), split) for split in SPLITS)
        super().__init__(train, val, test, batch_size, seed, epoch_batches, collate, task)
        self.context = context
        self.packed = packed
        self.classes: list[str] | None = None
        """Names of the classes, where texts belong to one each."""

    @property
    def folder(self) -> Path:
        """Where the tokens are."""
        if self._made is None:
            self._made = self._folder()
        return self._made

    def prepare_data(self) -> None:
        _ = self.folder

    @property
    def tokenizer(self) -> Any:
        """What the text was tokenized with, to be saved beside the model."""
        return self._tokenizer()

    @property
    def padding(self) -> int:
        """The token that rows of a batch are filled up with."""
        return padding_id(self.tokenizer)

    def _rows(self, split: str) -> Rows:
        return Rows(self.folder / split)
