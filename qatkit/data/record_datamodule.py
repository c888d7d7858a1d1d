"""A data module with cached records that are not text: table rows, images and recordings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from qatkit.data.datamodule import Collate, SplitDataModule
from qatkit.data.text import SPLITS
from qatkit.data.tokens import Rows


class RecordDataModule(SplitDataModule):
    """A data module with samples from the cached rows of one source.

    Args:
        folder: Returns the folder of the cached rows, and creates it if it does not exist.
        dataset: Creates a dataset from a function that opens a split, and the split's name.
        batch_size: Samples per device per step.
        seed: Determines the training order.
        task: Name of a task in `qatkit.tasks.TASKS`.
        classes: Class names in the order of the model's outputs, if the task has classes.
        collate: Combines samples into a batch; the default is torch's collation.
        workers: As in `SplitDataModule`.
    """

    def __init__(
        self,
        folder: Callable[[], Path],
        dataset: Callable[[Callable[[], Rows], str], Dataset[Any]],
        batch_size: int,
        seed: int,
        task: str,
        classes: Sequence[str] | None = None,
        collate: Collate | None = None,
        workers: int = 0,
    ) -> None:
        self._folder = folder
        self._made: Path | None = None
        train, val, test = (dataset(partial(self._rows, split), split) for split in SPLITS)
        super().__init__(train, val, test, batch_size, seed, None, collate, task, workers)
        self.classes = None if classes is None else list(classes)
        """Class names; compared with the outputs of a transformers model."""

    def prepare_data(self) -> None:
        self._made = self._folder()

    def _rows(self, split: str) -> Rows:
        if self._made is None:
            self.prepare_data()
        assert self._made is not None
        return Rows(self._made / split)
