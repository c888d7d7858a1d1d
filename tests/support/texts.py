"""Texts with ignored labels in batches of different sizes, and a Llama small enough to train in a test."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from qatkit.common.labels import IGNORED
from qatkit.models import llama

VOCAB = 300


def tiny_llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return llama(VOCAB, hidden=32, layers=1, heads=2, kv_heads=1, intermediate=48, context=16)


def texts(rows: int = 8, tokens: int = 12) -> dict[str, Tensor]:
    """Row r has r * 11 / 7 of its 12 labels: the first batches of a split hold far fewer than the last ones."""
    inputs = torch.randint(VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))
    labels = inputs.clone()
    for row in range(rows):
        labels[row, 1 + row * (tokens - 1) // max(rows - 1, 1) :] = IGNORED
    return {"input_ids": inputs, "labels": labels}


def loader(batch_size: int, rows: range | None = None, content: dict[str, Tensor] | None = None) -> DataLoader[object]:
    """The texts in their order, or some rows of them."""
    content = content or texts()
    chosen = rows or range(len(content["labels"]))
    return DataLoader([{key: value[row] for key, value in content.items()} for row in chosen], batch_size)  # type: ignore[arg-type]  # a list is a data set
