"""Data module with conversations and instructions for causal language models."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qatkit.data.chat_template import messages_of, teaches_end_of_turn, tokenize_chat
from qatkit.data.records import Answers, fitting, pad
from qatkit.data.source import BadRecord, Source
from qatkit.data.tokenizers import load_tokenizer, padding_id
from qatkit.data.tokens import Encoded, prepare, refuse_stream
from qatkit.errors import QatkitError, QatkitWarning

if TYPE_CHECKING:
    from qatkit.data.token_datamodule import TokenDataModule


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
    """Tokenize conversations with a chat template; only the assistant's turns contribute to the loss.

    A record has ``messages`` (role, content), ``conversations`` (from, value), ``prompt`` with ``completion`` or
    ``response``, or ``instruction`` with ``output`` and optionally ``input``. It may have ``tools``.

    Args:
        source: The records.
        tokenizer: A tokenizer folder, or the name of a model on the hub.
        context: Maximum length of a conversation in tokens.
        chat_template: A file with a Jinja template that replaces the tokenizer's own.
        truncate: Truncate longer conversations instead of rejecting them.
        epoch_batches: Batches between validations (and checkpoints); fewer if there are fewer records.
        batch_size: Conversations per device per step.
        seed: Determines the training order.

    Raises:
        QatkitError: there is no chat template, or rendering it does not terminate; a record is not a conversation or is
            too long; or a split would be empty.
    """
    from qatkit.data.token_datamodule import TokenDataModule

    refuse_stream(source)

    def load() -> Any:
        loaded = load_tokenizer(tokenizer, chat_template)
        if not loaded.chat_template:
            raise QatkitError(
                f"'{tokenizer}' has no chat template",
                key="tokenizer",
                advice="set chat_template: FILE.jinja, or use a chat model's tokenizer",
            )
        return loaded

    def folder() -> Path:
        loaded = load()
        if not teaches_end_of_turn(loaded):
            warnings.warn(
                f"{'chat_template' if chat_template else 'tokenizer'}: the template puts no end-of-turn token after an "
                "answer, so the model would not learn to stop; end assistant turns with a token such as "
                "{{ eos_token }}",
                QatkitWarning,
                stacklevel=2,
            )

        def encode(records: Sequence[Mapping[str, Any]]) -> list[Encoded]:
            return [_encode(loaded, record, context, truncate) for record in records]

        return prepare(source, loaded, {"kind": "chat", "context": context, "truncate": truncate}, encode)

    def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return pad(samples, padding_id(load()), context)

    return TokenDataModule(
        folder, load, lambda rows, split: Answers(rows), context, batch_size, seed, epoch_batches, collate=collate
    )


def _encode(tokenizer: Any, record: Mapping[str, Any], context: int, truncate: bool) -> Encoded:
    messages = messages_of(record)
    if isinstance(messages, BadRecord):
        return messages
    encoded = tokenize_chat(tokenizer, messages, record.get("tools") or None)
    if isinstance(encoded, BadRecord):
        return encoded
    ids, trained = (part[:context] if truncate else part for part in encoded)
    if not any(trained[1:]):
        return BadRecord("has no assistant token with a label; every label would be masked")
    return fitting({"input_ids": ids, "trained": trained}, context)


chat.task = "causal"  # type: ignore[attr-defined]  # read by `qatkit.tasks.declared_task`
