"""Read training text as a stream; a resumed run continues at the same token."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate
from typing_extensions import override

from qatkit.data.datamodule import batches_to_skip, world_and_rank
from qatkit.data.files import is_local, local_files, read_file
from qatkit.data.hub_records import open_split
from qatkit.data.packing import window
from qatkit.data.source import BadRecord, Record, Source
from qatkit.data.token_datamodule import TokenDataModule
from qatkit.data.tokens import Encode, refuse, rows_of
from qatkit.errors import QatkitError, QatkitWarning

if TYPE_CHECKING:
    from datasets import IterableDataset

READ_AHEAD = 32
"""Records per tokenizer call."""


class StreamLoader:
    """Batches of packed windows from an endless stream; an epoch is a fixed number of batches.

    Each process reads the whole stream and uses its part of each global batch, so one state in the checkpoint is valid
    for all processes. The stream restarts when it ends.

    Args:
        open_stream: Opens the stream of records.
        place: Converts an item of the stream and its index to a `Record`.
        encode: Tokenizes records.
        context: Window length in tokens.
        batch_size: Windows per process per step.
        epoch_batches: Batches per epoch.
        skip_bad: Skip records that cannot be used.
        limit: Returns the maximum number of batches per epoch, once training has started.

    Raises:
        QatkitError: a record cannot be used, or the stream is shorter than one window.
    """

    def __init__(
        self,
        open_stream: Callable[[], IterableDataset],
        place: Callable[[Any, int], Record],
        encode: Encode,
        context: int,
        batch_size: int,
        epoch_batches: int,
        skip_bad: bool,
        limit: Callable[[], float],
    ) -> None:
        self.open_stream = open_stream
        self.place = place
        self.encode = encode
        self.context = context
        self.batch_size = batch_size
        self.epoch_batches = epoch_batches
        self.skip_bad = skip_bad
        self.limit = limit
        self.bad = 0
        """Records skipped so far."""
        self.read = 0
        """Records read so far."""
        self._open()
        self._tokens: list[int] = []
        self._ends: list[int] = []
        self._served = self._skip = 0

    def __len__(self) -> int:
        return self.epoch_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        world, rank = world_and_rank()
        self._served, self._skip = batches_to_skip(self._skip, min(self.epoch_batches, self.limit())), 0
        while self._served < self.epoch_batches:
            windows = [self._window() for _ in range(world * self.batch_size)]
            self._served += 1
            yield default_collate(windows[rank * self.batch_size : (rank + 1) * self.batch_size])

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, and the tokens that do not yet fill a window."""
        return {
            "batches": self._served,
            "stream": self._stream.state_dict(),
            "tokens": list(self._tokens),
            "ends": list(self._ends),
            "read": self.read,
            "bad": self.bad,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position."""
        self._served = self._skip = state["batches"]
        self._tokens, self._ends = list(state["tokens"]), list(state["ends"])
        self.read, self.bad = state["read"], state["bad"]
        self._open(state["stream"])

    def _open(self, state: dict[str, Any] | None = None) -> None:
        self._stream = self.open_stream()
        if state is not None:
            self._stream.load_state_dict(state)
        self._items = iter(self._stream)

    def _window(self) -> dict[str, Tensor]:
        ended = 0
        while len(self._tokens) < self.context:
            if not self._read():
                ended += 1
                if ended == 2:
                    raise QatkitError(
                        f"{self.context} exceeds the length of the whole stream",
                        key="context",
                        advice="use a smaller context",
                    )
                self._open()
        packed = window(np.asarray(self._tokens[: self.context]), np.asarray(self._ends, np.int64))
        del self._tokens[: self.context]
        self._ends = [end - self.context for end in self._ends if end > self.context]
        return packed

    def _read(self) -> bool:
        """Read some records; return False if none is left."""
        items = list(islice(self._items, READ_AHEAD))
        records = [self.place(item, self.read + number) for number, item in enumerate(items, 1)]
        self.read += len(items)
        for where, rows in rows_of(records, self.encode):
            if isinstance(rows, BadRecord):
                if not self.skip_bad:
                    raise refuse(where, rows)
                self._skip_record(where, rows)
                continue
            for row in rows:
                self._tokens += row["input_ids"]
                self._ends.append(len(self._tokens))
        return bool(items)

    def _skip_record(self, where: str, reason: BadRecord) -> None:
        self.bad += 1
        if self.bad == 1 or self.bad % 1000 == 0:
            warnings.warn(
                f"source.skip_bad: skipped {self.bad} of {self.read} records so far; most recent: {where}: {reason}",
                QatkitWarning,
                stacklevel=2,
            )


class StreamingDataModule(TokenDataModule):
    """A `TokenDataModule` that streams its training text."""

    def read_from(self, source: Source, encoder: Callable[[], Encode]) -> None:
        """Set the source of the stream and its tokenization."""
        self._source, self._encoder = source, encoder

    @override
    def train_dataloader(self) -> StreamLoader:  # type: ignore[override]  # Lightning takes any iterable
        place, open_stream = _opener(self._source)
        assert self.epoch_batches is not None
        return StreamLoader(
            open_stream, place, self._encoder(), self.context, self.batch_size, self.epoch_batches,
            self._source.skip_bad, self.batches_taken,
        )  # fmt: skip


def _opener(source: Source) -> tuple[Callable[[Any, int], Record], Callable[[], IterableDataset]]:
    if not is_local(source.path):
        return lambda item, number: (f"{source.path}, train, row {number}", item), partial(open_split, source, "train")
    files = local_files(source.path, "source.path")

    def open_stream() -> IterableDataset:
        from datasets import IterableDataset

        return IterableDataset.from_generator(_items, gen_kwargs={"files": files, "lines": source.lines})

    return lambda item, _: (item["where"], item["record"]), open_stream


def _items(files: list[Path], lines: bool) -> Iterator[dict[str, Any]]:
    for file in files:
        for where, record in read_file(file, lines):
            yield {"where": where, "record": record}
