"""A data module over the cached tokens of `qatkit.data.tokens`."""

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
    """The splits of a folder that `qatkit.data.tokens.prepare` wrote.

    Args:
        folder: Returns the folder, and creates it if it does not exist.
        tokenizer: Returns the tokenizer.
        dataset: Builds a data set; called with a function that opens a split, and with the split's name.
        context: Maximum length of a sample in tokens.
        packed: Whether samples are windows of several documents.
        batch_size: Samples per device and step.
        seed: Determines the training order.
        epoch_batches: Batches between validations (and checkpoints).
        collate: Combines samples into a batch.
        task: Name of a row of `qatkit.tasks.TASKS`.

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
        """The tokenizer of the text; it is saved with the model."""
        return self._tokenizer()

    @property
    def padding(self) -> int:
        """The padding token of batches."""
        return padding_id(self.tokenizer)

    def _rows(self, split: str) -> Rows:
        return Rows(self.folder / split)
