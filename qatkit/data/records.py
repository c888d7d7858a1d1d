"""Records of unlike length as samples, and batches of them filled up to the longest."""

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
"""Rows of a batch are as long as a multiple of it: matrix units like it, and a compiler sees fewer shapes."""


class Records(Dataset[dict[str, Tensor]]):
    """A sample per record: its ``input_ids`` and all else that was kept of it, whole numbers as int64.

    Args:
        open_rows: Gives the split; called when the first record is read.
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
    """Conversations: labels are the tokens that the assistant wrote."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        trained = sample.pop("trained").bool()
        return sample | {"labels": sample["input_ids"].masked_fill(~trained, IGNORED)}


def pad(samples: Sequence[dict[str, Tensor]], padding: int, context: int) -> dict[str, Tensor]:
    """A batch: rows filled up on the right, and an ``attention_mask`` that says what was not.

    Args:
        samples: Tensors ``[tokens]`` are filled up, with `padding`, labels with -100, others with 0; 0-d ones stacked.
        padding: The padding token.
        context: Length at most.

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
    """The row by itself, or why it is too long."""
    if (tokens := len(row["input_ids"])) > context:
        return BadRecord(f"has {tokens} tokens, and context is {context}; write a larger context, or truncate: true")
    return [row]


def once(value: Callable[[], Any]) -> Callable[[], Any]:
    """A function that is called when its value is first asked for, and only then."""
    found: list[Any] = []

    def get() -> Any:
        if not found:
            found.append(value())
        return found[0]

    return get
