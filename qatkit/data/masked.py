"""Data module with plain text for masked language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qatkit.data.columns import encode_texts
from qatkit.data.records import Records, once, pad
from qatkit.data.source import Source
from qatkit.data.tokenizers import load_tokenizer, padding_id
from qatkit.data.tokens import Encoded, Row, Rows, prepare, refuse_stream
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.data.token_datamodule import TokenDataModule


class MaskedRecords(Records):
    """Samples with masked tokens, which differ in each training pass and are fixed for evaluation.

    80% of the chosen tokens are replaced by the mask token and 10% by a random token; 10% are unchanged (Devlin et al.
    2019, "BERT", section 3.1).

    Args:
        open_rows: Opens the split.
        collator: Returns transformers' `DataCollatorForLanguageModeling`.
        seed: Determines the masked tokens, together with the pass and the index of the sample.
        moving: Mask different tokens in each pass.
    """

    def __init__(self, open_rows: Callable[[], Rows], collator: Callable[[], Any], seed: int, moving: bool) -> None:
        super().__init__(open_rows)
        self.collator = collator
        self.seed = seed
        self.moving = moving
        self._pass = 0

    def set_pass(self, number: int) -> None:
        """Start a pass over the data."""
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
    """Mask random tokens for the model to predict; long texts are split into multiple samples.

    Args:
        source: The texts.
        tokenizer: A tokenizer folder, or the name of a model on the hub.
        context: Maximum length of a sample in tokens, including the tokenizer's special tokens.
        column: The name of the text column.
        probability: Fraction of tokens that are masked.
        epoch_batches: Batches between validations (and checkpoints); fewer if the dataset is smaller.
        batch_size: Samples per device per step.
        seed: Determines the training order and the masked tokens.

    Raises:
        QatkitError: the tokenizer has no mask token, an argument is out of range, a record has no text, or a split
            would be empty.
    """
    from qatkit.data.token_datamodule import TokenDataModule

    refuse_stream(source)
    if not 0 < probability < 1:
        raise QatkitError(
            f"{probability} is not between 0 and 1", key="probability", advice="use a fraction such as 0.15"
        )

    def load() -> Any:
        loaded = load_tokenizer(tokenizer)
        if loaded.mask_token_id is None:
            raise QatkitError(
                f"'{tokenizer}' has no mask token",
                key="tokenizer",
                advice="use a masked language model's tokenizer",
            )
        return loaded

    def folder() -> Path:
        loaded = load()
        around = loaded.num_special_tokens_to_add()
        if context <= around:
            raise QatkitError(
                f"{context} leaves no room for text besides {around} special tokens",
                key="context",
                advice=f"use {around + 1} or more",
            )

        def rows(texts: list[str]) -> list[list[Row]]:
            split: list[list[Row]] = [[] for _ in texts]
            if not texts:
                return split
            encoded = loaded(
                texts, truncation=True, max_length=context, return_overflowing_tokens=True,
                return_special_tokens_mask=True, verbose=False,
            )  # fmt: skip
            parts = (encoded[name] for name in ("overflow_to_sample_mapping", "input_ids", "special_tokens_mask"))
            for text, ids, special in zip(*parts, strict=True):
                split[text].append({"input_ids": ids, "special": special})
            return split

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
