"""Plain text for a masked language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatkit.data.columns import encode_texts
from qatkit.data.records import Records, once, pad
from qatkit.data.source import Source
from qatkit.data.tokenizers import load_tokenizer, padding_id
from qatkit.data.tokens import Encoded, Row, Rows, TokenDataModule, prepare, refuse_stream
from qatkit.errors import QatkitError


class MaskedRecords(Records):
    """Texts with some tokens hidden: others in every pass over training data, always the same in evaluation.

    Devlin et al. (2019), "BERT", section 3.1: of the chosen tokens 80 % become the mask, 10 % another token, 10 % stay.

    Args:
        open_rows: Gives the split.
        collator: Gives transformers' `DataCollatorForLanguageModeling`.
        seed: With the pass and the index of a text, decides what is hidden in it.
        moving: Whether a pass hides other tokens than the one before.
    """

    def __init__(self, open_rows: Callable[[], Rows], collator: Callable[[], Any], seed: int, moving: bool) -> None:
        super().__init__(open_rows)
        self.collator = collator
        self.seed = seed
        self.moving = moving
        self._pass = 0

    def set_pass(self, number: int) -> None:
        """Begin a pass over the data."""
        self._pass = number if self.moving else 0

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        collator = self.collator()
        collator.generator = torch.Generator().manual_seed(hash((self.seed, self._pass, index)) % 2**63)
        hidden, labels = collator.torch_mask_tokens(sample["input_ids"][None].clone(), sample["special"][None])
        return {"input_ids": hidden[0], "labels": labels[0]}


def masked_text(
    source: Source,
    tokenizer: str,
    context: int = 128,
    column: str = "text",
    probability: float = 0.15,
    epoch_batches: int = 100,
    batch_size: int = 32,
    seed: int = 0,
) -> TokenDataModule:
    """Texts in which a model is to find the tokens that were hidden; longer ones are cut into several.

    Args:
        source: Where the texts come from.
        tokenizer: A folder that holds one, or the name of a model on the hub.
        context: Tokens of a sample at most, those that the tokenizer puts around it among them.
        column: Holds the text of a record.
        probability: Share of tokens that are hidden.
        epoch_batches: Batches between two validations and checkpoints; fewer where there are fewer texts.
        batch_size: Samples per device and step.
        seed: Decides the training order, and what is hidden.

    Raises:
        QatkitError: the tokenizer has no mask token, a number is out of range, a record has no text, or a split is left
            without one.
    """
    refuse_stream(source)
    if not 0 < probability < 1:
        raise QatkitError(
            f"probability: {probability} is out of range; write a share above 0 and below 1, such as 0.15"
        )

    def load() -> Any:
        loaded = load_tokenizer(tokenizer)
        if loaded.mask_token_id is None:
            raise QatkitError(f"tokenizer: '{tokenizer}' has no mask token; write that of a masked language model")
        return loaded

    def folder() -> Path:
        loaded = load()
        around = loaded.num_special_tokens_to_add()
        if context <= around:
            raise QatkitError(f"context: {context} leaves no token beside {around} special ones; write more")

        def rows(texts: list[str]) -> list[list[Row]]:
            found: list[list[Row]] = [[] for _ in texts]
            if not texts:
                return found
            encoded = loaded(
                texts, truncation=True, max_length=context, return_overflowing_tokens=True,
                return_special_tokens_mask=True, verbose=False,
            )  # fmt: skip
            parts = (encoded[name] for name in ("overflow_to_sample_mapping", "input_ids", "special_tokens_mask"))
            for text, ids, special in zip(*parts, strict=True):
                found[text].append({"input_ids": ids, "special": special})
            return found

        def encode(records: Sequence[Mapping[str, Any]]) -> list[Encoded]:
            return encode_texts(records, column, rows)

        return prepare(source, loaded, {"kind": "masked_text", "column": column, "context": context}, encode)

    def make_collator() -> Any:
        from transformers import DataCollatorForLanguageModeling

        return DataCollatorForLanguageModeling(load(), mlm=True, mlm_probability=probability)

    collator = once(make_collator)

    def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        return {**pad(samples, padding_id(load()), context), "task": "masked"}

    return TokenDataModule(
        folder, load,
        lambda rows, split: MaskedRecords(rows, collator, seed, moving=split == "train"),
        context, batch_size, seed, epoch_batches, collate=collate, task="masked",
    )  # fmt: skip


masked_text.task = "masked"  # type: ignore[attr-defined]  # read by `qatkit.tasks.declared_task`
