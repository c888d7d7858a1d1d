"""Data module for text classification: texts or text pairs with a class label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qatkit.data.classes import check_classes, class_of
from qatkit.data.columns import words_in
from qatkit.data.records import Records, fitting, pad
from qatkit.data.source import BadRecord, Source
from qatkit.data.tokenizers import load_tokenizer, padding_id
from qatkit.data.tokens import Encoded, prepare, refuse_stream

if TYPE_CHECKING:
    from qatkit.data.token_datamodule import TokenDataModule


def text_classification(
    source: Source,
    tokenizer: str,
    classes: Sequence[str],
    context: int = 128,
    column: str = "text",
    partner: str | None = None,
    label: str = "label",
    truncate: bool = True,
    epoch_batches: int = 100,
    batch_size: int = 32,
    seed: int = 0,
) -> TokenDataModule:
    """Tokenize texts or text pairs with a class label, in the format of the tokenizer's own model.

    Args:
        source: The records.
        tokenizer: A tokenizer folder, or the name of a model on the hub.
        classes: Class names in the order of the model's outputs. A record contains a name or an index.
        context: Maximum length of a sample in tokens.
        column: The name of the text column.
        partner: The column with the second text, for text pairs.
        label: The column with the class.
        truncate: Truncate longer samples instead of rejecting them.
        epoch_batches: Batches between validations (and checkpoints); fewer if there are fewer records.
        batch_size: Samples per device per step.
        seed: Determines the training order.

    Raises:
        QatkitError: there are fewer than two classes, a record has no text or an unknown class, or a split would be
            empty.
    """
    from qatkit.data.token_datamodule import TokenDataModule

    refuse_stream(source)
    check_classes(classes)
    columns = [column] if partner is None else [column, partner]

    def encode_one(loaded: Any, record: Mapping[str, Any]) -> Encoded:
        texts = [words_in(record, name) for name in columns]
        for bad in texts:
            if isinstance(bad, BadRecord):
                return bad
        number = class_of(record, label, classes)
        if isinstance(number, BadRecord):
            return number
        cut = {"truncation": True, "max_length": context} if truncate else {}
        encoded = loaded(*texts, return_attention_mask=False, verbose=False, **cut)
        return fitting({**{name: list(ids) for name, ids in encoded.items()}, "labels": number}, context)

    def folder() -> Path:
        loaded = load_tokenizer(tokenizer)

        def encode(records: Sequence[Mapping[str, Any]]) -> list[Encoded]:
            return [encode_one(loaded, record) for record in records]

        options = [list(classes), context, columns, label, truncate]
        return prepare(source, loaded, {"kind": "classification", "options": options}, encode)

    def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return pad(samples, padding_id(load_tokenizer(tokenizer)), context)

    data = TokenDataModule(
        folder,
        partial(load_tokenizer, tokenizer),
        lambda rows, split: Records(rows),
        context,
        batch_size,
        seed,
        epoch_batches,
        collate=collate,
        task="text_classification",
    )
    data.classes = list(classes)
    return data


text_classification.task = "text_classification"  # type: ignore[attr-defined]  # read by `qatkit.tasks.declared_task`
