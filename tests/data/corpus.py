"""Small files and a small tokenizer, made in the test."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from qatkit.data.text import END_OF_TEXT, train_tokenizer

SENTENCES = [
    f"{who} {does} the {what} {number} times.\n" * (1 + number % 3)
    for number, (who, does, what) in enumerate(
        (who, does, what)
        for who in ("Ada", "Grace", "Alan", "Edsger", "Barbara")
        for does in ("counts", "moves", "paints", "forgets")
        for what in ("red boxes", "small keys", "long ropes", "old books")
    )
]


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """A file of JSON lines; strings are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def save_tokenizer(folder: Path, chat_template: str | None = None, **special: str) -> str:
    """A byte-level tokenizer of 300 tokens in a folder, as one from the hub would be."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(SENTENCES, 300).save(str(folder / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=END_OF_TEXT, **special)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return str(folder)
