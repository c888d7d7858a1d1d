"""A data module with the cached tokens of `qatkit.data.tokens`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from qatkit.data.datamodule import Collate, SplitDataModule, check_epoch
from qatkit.data.text import SPLITS
from qatkit.data.tokenizers import padding_id
from qatkit.data.tokens import Rows


class TokenDataModule(SplitDataModule):
    """A data module with the splits in a folder written by `qatkit.data.tokens.prepare`.

    Args:
        folder: Returns the folder, and creates it if it does not exist.
        tokenizer: Returns the tokenizer.
        dataset: Creates a dataset from a function that opens a split, and the split's name.
        context: Maximum length of a sample in tokens.
        packed: Whether samples are windows with multiple documents.
        batch_size: Samples per device per step.
        seed: Determines the training order.
        epoch_batches: Batches between validations (and checkpoints).
        collate: Combines samples into a batch.
        task: Name of a task in `qatkit.tasks.TASKS`.

    Raises:
        QatkitError: `epoch_batches` is out of range.
    """

    def __init__(
        self,
        folder: Callable[[], Path],
        tokenizer: Callable[[], Any],
        dataset: Callable[[Callable[[], Rows], str], Dataset[Any]],
        context: int,
        batch_size: int,
        seed: int,
        epoch_batches: int,
        packed: bool = False,
        collate: Collate | None = None,
        task: str = "causal",
    ) -> None:
        check_epoch(epoch_batches)
        self._folder = folder
        self._tokenizer = tokenizer
        self._made: Path | None = None
        train, val, test = (dataset(partial(self._rows, split), split) for split in SPLITS)
        super().__init__(train, val, test, batch_size, seed, epoch_batches, collate, task)
        self.context = context
        self.packed = packed
        self.classes: list[str] | None = None
        """Class names, if texts are classified."""

    @property
    def folder(self) -> Path:
        """The folder of the cached tokens."""
        if self._made is None:
            self._made = self._folder()
        return self._made

    def prepare_data(self) -> None:
        _ = self.folder

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the data, which is saved with the model."""
        return self._tokenizer()

    @property
    def padding(self) -> int:
        """The ID of the padding token in batches."""
        return padding_id(self.tokenizer)

    def _rows(self, split: str) -> Rows:
        return Rows(self.folder / split)
