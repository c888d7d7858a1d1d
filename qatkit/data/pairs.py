"""Data module with pairs of related texts for embedding models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from qatkit.data.columns import words_in
from qatkit.data.records import Records, fitting, pad
from qatkit.data.source import BadRecord, Source
from qatkit.data.tokenizers import load_tokenizer, padding_id
from qatkit.data.tokens import Encoded, Row, Rows, prepare, refuse_stream

if TYPE_CHECKING:
    from qatkit.data.token_datamodule import TokenDataModule

Pair = tuple[dict[str, Tensor], dict[str, Tensor]]


class Pairs(Dataset[Pair]):
    """Text pairs; the two texts of a record are stored in adjacent rows."""

    def __init__(self, open_rows: Callable[[], Rows]) -> None:
        self.records = Records(open_rows)

    def __len__(self) -> int:
        return len(self.records) // 2

    def __getitem__(self, index: int) -> Pair:
        return self.records[2 * index], self.records[2 * index + 1]


def text_pairs(
    source: Source,
    tokenizer: str,
    context: int = 128,
    columns: tuple[str, str] = ("text", "partner"),
    pooling: Literal["mean", "cls", "last"] = "mean",
    truncate: bool = True,
    epoch_batches: int = 100,
    batch_size: int = 32,
    seed: int = 0,
) -> TokenDataModule:
    """Tokenize text pairs, such as questions and answers; each text should be closest to its partner in the batch.

    Args:
        source: The records.
        tokenizer: A tokenizer folder, or the name of a model on the hub.
        context: Maximum length of each text in tokens.
        columns: The names of the two text columns.
        pooling: How to pool hidden states into an embedding: their mean ("mean"), the first token ("cls") or the last
            token ("last").
        truncate: Truncate longer texts instead of rejecting them.
        epoch_batches: Batches between validations (and checkpoints); fewer if there are fewer records.
        batch_size: Pairs per device per step; larger batches make the task harder.
        seed: Determines the training order.

    Raises:
        QatkitError: a record lacks one of the texts, or a split would be empty.
    """
    from qatkit.data.token_datamodule import TokenDataModule

    refuse_stream(source)

    def encode_one(loaded: Any, record: Mapping[str, Any]) -> Encoded:
        rows: list[Row] = []
        for name in columns:
            text = words_in(record, name)
            if isinstance(text, BadRecord):
                return text
            cut = {"truncation": True, "max_length": context} if truncate else {}
            encoded = fitting({"input_ids": list(loaded(text, verbose=False, **cut)["input_ids"])}, context)
            if isinstance(encoded, BadRecord):
                return encoded
            rows += encoded
        return rows

    def folder() -> Path:
        loaded = load_tokenizer(tokenizer)

        def encode(records: Sequence[Mapping[str, Any]]) -> list[Encoded]:
            return [encode_one(loaded, record) for record in records]

        return prepare(source, loaded, {"kind": "pairs", "options": [list(columns), context, truncate]}, encode)

    def collate(samples: Sequence[Pair]) -> dict[str, Any]:
        rows = [sample[side] for side in (0, 1) for sample in samples]
        batch = pad(rows, padding_id(load_tokenizer(tokenizer)), context)
        return {**batch, "labels": torch.arange(len(samples)), "task": "pairs", "pooling": pooling}

    return TokenDataModule(
        folder,
        partial(load_tokenizer, tokenizer),
        lambda rows, split: Pairs(rows),
        context,
        batch_size,
        seed,
        epoch_batches,
        collate=collate,
        task="pairs",
    )


text_pairs.task = "pairs"  # type: ignore[attr-defined]  # read by `qatkit.tasks.declared_task`
