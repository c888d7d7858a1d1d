"""A text that is read while training goes on, and found again at the same token when a run resumes."""

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
from qatkit.data.tokens import Encode, TokenDataModule, refuse, rows_of
from qatkit.errors import QatkitError, QatkitWarning

if TYPE_CHECKING:
    from datasets import IterableDataset

READ_AHEAD = 32
"""Records that are read and tokenized at once."""


class StreamLoader:
    """Batches of packed windows of an endless stream; an epoch is a number of batches.

    Every process reads the whole stream and takes its share of every global batch, so that one state, which is all that
    a checkpoint holds, is right for all of them. At its end the stream begins again.

    Args:
        open_stream: Gives the records.
        place: Says of one of them, and of its number, where it stands and what it is.
        encode: Makes tokens of records.
        context: Tokens of a window.
        batch_size: Windows per process and step.
        epoch_batches: Batches of an epoch.
        skip_bad: Leave out records that cannot be used.
        limit: Says, once training began, how many batches of an epoch it takes at most.

    Raises:
        QatkitError: a record cannot be used, or the stream has not one window.
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
        """Records that were left out so far."""
        self.read = 0
        """Records that were read so far."""
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
        """Where the stream stands: what was read of it, and the tokens that wait for their window."""
        return {
            "batches": self._served,
            "stream": self._stream.state_dict(),
            "tokens": list(self._tokens),
            "ends": list(self._ends),
            "read": self.read,
            "bad": self.bad,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another loader stood."""
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
                    raise QatkitError(f"context: {self.context} is longer than the whole stream; write less")
                self._open()
        found = window(np.asarray(self._tokens[: self.context]), np.asarray(self._ends, np.int64))
        del self._tokens[: self.context]
        self._ends = [end - self.context for end in self._ends if end > self.context]
        return found

    def _read(self) -> bool:
        """Read some records; False where none is left."""
        items = list(islice(self._items, READ_AHEAD))
        records = [self.place(item, self.read + number) for number, item in enumerate(items, 1)]
        self.read += len(items)
        for where, rows in rows_of(records, self.encode):
            if isinstance(rows, BadRecord):
                if not self.skip_bad:
                    raise refuse(where, rows)
                self._leave_out(where, rows)
                continue
            for row in rows:
                self._tokens += row["input_ids"]
                self._ends.append(len(self._tokens))
        return bool(items)

    def _leave_out(self, where: str, reason: BadRecord) -> None:
        self.bad += 1
        if self.bad == 1 or self.bad % 1000 == 0:
            warnings.warn(
                f"source.skip_bad: {self.bad} of {self.read} records were left out so far, the last: {where}: {reason}",
                QatkitWarning,
                stacklevel=2,
            )


class StreamingDataModule(TokenDataModule):
    """A `TokenDataModule` whose training text is a stream."""

    def read_from(self, source: Source, encoder: Callable[[], Encode]) -> None:
        """Where the stream comes from, and what makes tokens of it."""
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
