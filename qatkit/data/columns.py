"""Columns of records, and the tokens of their text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qatkit.data.source import BadRecord
from qatkit.data.tokens import Encoded, Row


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts; what is written in a text like a special token is one."""
    if not texts:
        return []
    found: list[list[int]] = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)[
        "input_ids"
    ]
    return found


def documents_of(tokenizer: Any, end: int, texts: list[str]) -> list[list[int]]:
    """Token ids of documents, the end of text after each.

    With what the tokenizer puts at a text's start: models of some families answer nonsense without it.
    """
    return [ids if ids[-1:] == [end] else [*ids, end] for ids in ids_of(tokenizer, texts)]


def encode_texts(
    records: Sequence[Mapping[str, Any]], column: str, encode: Callable[[list[str]], Sequence[list[Row]]]
) -> list[Encoded]:
    """Encode one column of records at once, with a `BadRecord` in the place of each that has no text there.

    A blank text has nothing to learn, and becomes no row.
    """
    checked = [text_in(record, column) for record in records]
    rows = iter(encode([text for text in checked if isinstance(text, str) and text.strip()]))
    return [text if isinstance(text, BadRecord) else next(rows) if text.strip() else [] for text in checked]


def text_in(record: Mapping[str, Any], column: str) -> str | BadRecord:
    """The text of a record, perhaps a blank one, or why it has none."""
    if column not in record:
        return BadRecord(f"has no column '{column}' but {sorted(map(str, record))}")
    text = record[column]
    if not isinstance(text, str):
        return BadRecord(f"column '{column}' holds {type(text).__name__} and no text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # which JSON can write, and tokenizers cannot read
            return BadRecord(f"column '{column}' holds half of a character (a lone surrogate)")
    return text


def words_in(record: Mapping[str, Any], column: str) -> str | BadRecord:
    """The text of a record, which is not to be blank, or why there is none."""
    text = text_in(record, column)
    if isinstance(text, str) and not text.strip():
        return BadRecord(f"column '{column}' is empty")
    return text
