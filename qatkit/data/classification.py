"""Texts, or pairs of texts, with one class each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qatkit.data.columns import missing, words_in
from qatkit.data.records import Records, fitting, pad
from qatkit.data.source import BadRecord, Source
from qatkit.data.tokenizers import load_tokenizer, padding_id
from qatkit.data.tokens import Encoded, prepare, refuse_stream
from qatkit.errors import QatkitError

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
    """Tokenize texts, or pairs of texts, with one class each, in the format of the tokenizer's own model.

    Args:
        source: The records.
        tokenizer: A tokenizer folder, or the name of a model on the hub.
        classes: Class names in the order of the model's outputs. A record gives a name or an index.
        context: Maximum length of a text in tokens.
        column: The name of the text column.
        partner: The column with the second text, if pairs are classified.
        label: The column with the class.
        truncate: Truncate longer texts instead of rejecting them.
        epoch_batches: Batches between validations (and checkpoints); fewer if there are fewer records.
        batch_size: Texts per device and step.
        seed: Determines the training order.

    Raises:
        QatkitError: there are fewer than two classes, a record has no text or no known class, or a split would be
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


def check_classes(classes: Sequence[str]) -> None:
    """Raise unless there are two or more different class names.

    Raises:
        QatkitError: there are fewer, or one occurs twice.
    """
    if len(set(classes)) < max(2, len(classes)):
        raise QatkitError(
            f"{list(classes)} is not a list of two or more different names",
            key="classes",
            advice="name each class once, in the order of the model's outputs",
        )


def class_of(record: Mapping[str, Any], column: str, classes: Sequence[str]) -> int | BadRecord:
    """Return the index of a record's class, or the reason why it has none.

    If names of classes are numbers, a number is such a name and never an index.

    Example:
        >>> class_of({"label": "dog"}, "label", ["cat", "dog"]), class_of({"label": 0}, "label", ["cat", "dog"])
        (1, 0)
    """
    if column not in record:
        return missing(record, column)
    value = record[column]
    position = position_of(value, classes)
    if position is not None:
        return position
    number = _number(value)
    if _named_numbers(tuple(classes)):
        return BadRecord(f"{column} {_shown(value)} is not one of {list(classes)}, some of which are numbers")
    if number is not None and number.is_integer() and 0 <= number < len(classes):
        return int(number)
    return BadRecord(f"{column} {_shown(value)} is neither one of {list(classes)} nor an index")


def position_of(value: Any, names: Sequence[str]) -> int | None:
    """Return the position of a value among names; numbers are equal however a file writes them.

    A CSV file gives "1" or "1.0" where JSON lines and Parquet give 1 or 1.0.

    Example:
        >>> position_of("b", ["a", "b"]), position_of(1.0, ["0", "1"]), position_of("1", ["0.0", "1.0"])
        (1, 1, 1)
    """
    if isinstance(value, str) and value in names:
        return list(names).index(value)
    number = _number(value)
    return None if number is None else _named_numbers(tuple(names)).get(number)


@lru_cache(maxsize=64)
def _named_numbers(names: tuple[str, ...]) -> dict[float, int]:
    """The positions of the names that are numbers."""
    found: dict[float, int] = {}
    for index, name in enumerate(names):
        if (number := _number(name)) is not None:
            found.setdefault(number, index)
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        return None
    if isinstance(value, str) and "_" in value:  # Python reads 1_0 as ten
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(value: Any) -> str:
    shown = json.dumps(value, default=str)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."


text_classification.task = "text_classification"  # type: ignore[attr-defined]  # read by `qatkit.tasks.declared_task`
