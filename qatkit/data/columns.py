"""Read text columns of records and tokenize them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qatkit.data.source import BadRecord, missing
from qatkit.data.tokens import Encoded, Row


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokenize texts; the text of a special token is encoded as that token."""
    if not texts:
        return []
    encoded = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def documents_of(tokenizer: Any, end: int, texts: list[str]) -> list[list[int]]:
    """Tokenize documents and append the end-of-text token to each.

    Tokens that the tokenizer adds at the start of a text are kept, because some model families need them.
    """
    return [ids if ids[-1:] == [end] else [*ids, end] for ids in ids_of(tokenizer, texts)]


def encode_texts(
    records: Sequence[Mapping[str, Any]], column: str, encode: Callable[[list[str]], Sequence[list[Row]]]
) -> list[Encoded]:
    """Encode one column of multiple records at once; a record without text in this column becomes a `BadRecord`.

    Blank text has no training signal, so it becomes an empty list of rows.
    """
    checked = [text_in(record, column) for record in records]
    rows = iter(encode([text for text in checked if isinstance(text, str) and text.strip()]))
    return [text if isinstance(text, BadRecord) else next(rows) if text.strip() else [] for text in checked]


def text_in(record: Mapping[str, Any], column: str) -> str | BadRecord:
    """Return the text of a record, which may be blank, or the reason why it has none."""
    if column not in record:
        return missing(record, column)
    text = record[column]
    if not isinstance(text, str):
        return BadRecord(f"column '{column}' contains {type(text).__name__}, not text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can represent it, but tokenizers cannot read it
            return BadRecord(f"column '{column}' contains a lone surrogate (half of a pair)")
    return text


def words_in(record: Mapping[str, Any], column: str) -> str | BadRecord:
    """Return the text of a record, or the reason why it has none; blank text is treated as missing."""
    text = text_in(record, column)
    if isinstance(text, str) and not text.strip():
        return BadRecord(f"column '{column}' is empty")
    return text
