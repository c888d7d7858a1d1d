"""Data module with plain text for causal language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qatkit.data.columns import documents_of, encode_texts
from qatkit.data.packing import PackedWindows
from qatkit.data.source import Source
from qatkit.data.tokenizers import end_of_text, load_tokenizer
from qatkit.data.tokens import Encode, Encoded, Row, prepare

if TYPE_CHECKING:
    from qatkit.data.token_datamodule import TokenDataModule


def causal_text(
    source: Source,
    tokenizer: str,
    context: int = 512,
    column: str = "text",
    epoch_batches: int = 100,
    batch_size: int = 8,
    seed: int = 0,
) -> TokenDataModule:
    """Pack documents into windows, separated by end-of-text tokens; no document attends to another.

    Tokens are cached in ``$XDG_CACHE_HOME/qatkit`` or ``~/.cache/qatkit``, and the cache is rebuilt when files,
    tokenizer or options change. With `source.streaming`, training records are tokenized during training instead.

    Args:
        source: The documents.
        tokenizer: A tokenizer folder, or the name of a model on the hub.
        context: Window length in tokens, at least 2.
        column: The name of the text column.
        epoch_batches: Batches between validations (and checkpoints); fewer if the text is shorter.
        batch_size: Windows per device per step.
        seed: Determines the training order.

    Raises:
        QatkitError: a record has no text in that column, or a split would be empty.
    """
    from qatkit.data.streaming import StreamingDataModule
    from qatkit.data.token_datamodule import TokenDataModule

    def encoder() -> Encode:
        loaded = load_tokenizer(tokenizer)
        end = end_of_text(loaded, tokenizer)

        def rows(texts: list[str]) -> list[list[Row]]:
            return [[{"input_ids": ids}] for ids in documents_of(loaded, end, texts)]

        def encode(records: Sequence[Mapping[str, Any]]) -> list[Encoded]:
            return encode_texts(records, column, rows)

        return encode

    def folder() -> Path:
        return prepare(source, load_tokenizer(tokenizer), {"kind": "causal_text", "column": column}, encoder())

    module = TokenDataModule if not source.streaming else StreamingDataModule
    data = module(
        folder,
        partial(load_tokenizer, tokenizer),
        lambda rows, split: PackedWindows(rows, context),
        context,
        batch_size,
        seed,
        epoch_batches,
        packed=True,
    )
    if isinstance(data, StreamingDataModule):
        data.read_from(source, encoder)
    return data


causal_text.task = "causal"  # type: ignore[attr-defined]  # read by `qatkit.tasks.declared_task`
causal_text.packed = True  # type: ignore[attr-defined]  # read before training: a row holds several documents
