"""Samples of different lengths, padded in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from qatkit.common.labels import IGNORED
from qatkit.data.source import BadRecord
from qatkit.data.tokens import Encoded, Row, Rows

MULTIPLE = 8
"""Batches are padded to a multiple of this length, which is faster on tensor cores and causes fewer recompilations."""


class Records(Dataset[dict[str, Tensor]]):
    """One sample per record, with its ``input_ids`` and all other stored fields as int64.

    Args:
        open_rows: Function that opens the split; called when the first record is read.
    """

    def __init__(self, open_rows: Callable[[], Rows]) -> None:
        self.open_rows = open_rows

    @cached_property
    def rows(self) -> Rows:
        """The split."""
        return self.open_rows()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.asarray(a, np.int64)) for name, a in self.rows.row(index).items()}


class Answers(Records):
    """Conversations in which only the assistant's tokens have labels."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        trained = sample.pop("trained").bool()
        return sample | {"labels": sample["input_ids"].masked_fill(~trained, IGNORED)}


def pad(samples: Sequence[dict[str, Tensor]], padding: int, context: int) -> dict[str, Tensor]:
    """Combine samples into a right-padded batch with an ``attention_mask``.

    Args:
        samples: The samples. Input IDs ``[tokens]`` are padded with `padding`, labels with -100, other tensors
            ``[tokens]`` with 0; 0-d tensors are stacked.
        padding: The padding token ID.
        context: Maximum length, unless a sample is longer.

    Example:
        >>> batch = pad([{"input_ids": torch.tensor([5, 6])}], padding=0, context=4)
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
        ([[5, 6, 0, 0]], [[1, 1, 0, 0]])
    """
    longest = max(len(sample["input_ids"]) for sample in samples)
    length = min(-(-longest // MULTIPLE) * MULTIPLE, max(context, longest))
    fill = {"input_ids": padding, "labels": IGNORED}
    batch = {}
    for name, first in samples[0].items():
        column = [sample[name] for sample in samples]
        if first.dim() == 0:
            batch[name] = torch.stack(column)
            continue
        batch[name] = torch.full((len(samples), length), fill.get(name, 0), dtype=torch.int64)
        for row, values in zip(batch[name], column, strict=True):
            row[: len(values)] = values
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    return batch | {"attention_mask": (torch.arange(length) < lengths[:, None]).long()}


def fitting(row: Row, context: int) -> Encoded:
    """Return the row in a list, or the reason why it exceeds the maximum length."""
    if (tokens := len(row["input_ids"])) > context:
        return BadRecord(f"has {tokens} tokens, but context is {context}", "use a larger context, or truncate: true")
    return [row]


def once(value: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that computes a value on its first call and caches it."""
    values: list[Any] = []

    def get() -> Any:
        if not values:
            values.append(value())
        return values[0]

    return get
