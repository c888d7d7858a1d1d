"""Conversations and instructions for a causal language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qatkit.data.chat_template import messages_of, tokenize_chat
from qatkit.data.records import Answers, fitting, pad
from qatkit.data.source import BadRecord, Source
from qatkit.data.tokenizers import load_tokenizer, padding_id
from qatkit.data.tokens import Encoded, TokenDataModule, prepare, refuse_stream
from qatkit.errors import QatkitError


def chat(
    source: Source,
    tokenizer: str,
    context: int = 1024,
    chat_template: str | None = None,
    truncate: bool = False,
    epoch_batches: int = 100,
    batch_size: int = 8,
    seed: int = 0,
) -> TokenDataModule:
    """Conversations in the tokenizer's chat template, with a loss on what the assistant says alone.

    A record has ``messages`` of role and content, ``conversations`` of from and value, ``prompt`` and ``completion``
    (or ``response``), or ``instruction``, ``output`` and perhaps ``input``; and perhaps ``tools``.

    Args:
        source: Where the records come from.
        tokenizer: A folder that holds one, or the name of a model on the hub.
        context: Tokens of a conversation at most.
        chat_template: A file with a Jinja template in the place of the tokenizer's own.
        truncate: Cut longer conversations off instead of refusing them.
        epoch_batches: Batches between two validations and checkpoints; fewer where there are fewer records.
        batch_size: Conversations per device and step.
        seed: Decides the training order.

    Raises:
        QatkitError: there is no chat template, a record is no conversation or too long, or a split is left without one.
    """
    refuse_stream(source)

    def load() -> Any:
        loaded = load_tokenizer(tokenizer, chat_template)
        if not loaded.chat_template:
            raise QatkitError(
                f"tokenizer: '{tokenizer}' has no chat template; write chat_template: FILE.jinja, or the tokenizer of "
                "a model that was trained to chat"
            )
        return loaded

    def folder() -> Path:
        loaded = load()

        def encode(records: Sequence[Mapping[str, Any]]) -> list[Encoded]:
            return [_encode(loaded, record, context, truncate) for record in records]

        return prepare(source, loaded, {"kind": "chat", "context": context, "truncate": truncate}, encode)

    def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return pad(samples, padding_id(load()), context)

    return TokenDataModule(
        folder, load, lambda rows, split: Answers(rows), context, batch_size, seed, epoch_batches, collate=collate
    )


chat.task = "causal"  # type: ignore[attr-defined]  # read by `qatkit.tasks.declared_task`


def _encode(tokenizer: Any, record: Mapping[str, Any], context: int, truncate: bool) -> Encoded:
    messages = messages_of(record)
    if isinstance(messages, BadRecord):
        return messages
    encoded = tokenize_chat(tokenizer, messages, record.get("tools") or None)
    if isinstance(encoded, BadRecord):
        return encoded
    ids, trained = (part[:context] if truncate else part for part in encoded)
    if not any(trained[1:]):
        return BadRecord("has no token of the assistant's to learn; every label would be masked")
    return fitting({"input_ids": ids, "trained": trained}, context)
