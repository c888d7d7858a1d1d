"""A data module with windows of tokenized text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qatkit.data.datamodule import SplitDataModule, check_epoch
from qatkit.data.text import END_OF_TEXT, SPLITS, Windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TextDataModule(SplitDataModule):
    """A data module with token windows from a folder with the tokenizer and one token stream per split.

    Args:
        folder: Returns the folder, and creates it if it does not exist; for example `stdlib_tokens`.
        context: Window length in tokens.
        batch_size: Windows per device per step.
        seed: Determines the training order.
        epoch_batches: Batches between validations (and checkpoints).
        load: Returns the tokenizer, if the folder contains none.

    Raises:
        QatkitError: `context` or `epoch_batches` is out of range.
    """

    def __init__(
        self,
        folder: Callable[[], Path],
        context: int,
        batch_size: int = 64,
        seed: int = 0,
        epoch_batches: int = 100,
        load: Callable[[], PreTrainedTokenizerFast] | None = None,
    ) -> None:
        check_epoch(epoch_batches)
        train, val, test = (Windows(partial(_open_split, folder, split), context) for split in SPLITS)
        super().__init__(train, val, test, batch_size, seed, epoch_batches, task="causal")
        self.folder = folder
        self._load = load

    def prepare_data(self) -> None:
        self.folder()

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of the data, which is saved with the model."""
        if self._load is not None:
            return self._load()
        from transformers import PreTrainedTokenizerFast

        file = str(self.folder() / "tokenizer.json")
        return PreTrainedTokenizerFast(tokenizer_file=file, eos_token=END_OF_TEXT)  # type: ignore[no-untyped-call]


def _open_split(folder: Callable[[], Path], split: str) -> NDArray[Any]:
    tokens: NDArray[Any] = np.load(folder() / f"{split}.npy", mmap_mode="r")
    return tokens
