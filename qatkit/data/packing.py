"""Pack documents into windows of equal length without attention between documents."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from qatkit.common.labels import IGNORED
from qatkit.data.tokens import Rows
from qatkit.errors import QatkitError


class PackedWindows(Dataset[dict[str, Tensor]]):
    """The tokens of a split in windows: ``input_ids``, ``labels`` and ``position_ids``, each ``[context]`` int64.

    Positions restart at 0 at each document and each window. transformers models derive the attention mask from them, so
    that a token attends only to earlier tokens of its own document. The first token of a document cannot be predicted,
    so its label is ignored. Tokens at the end of the stream that do not fill a window are dropped.

    Args:
        open_rows: Function that opens the split; called when the first window is read.
        context: Window length in tokens, at least 2.

    Raises:
        QatkitError: `context` is below 2, or the split is shorter than one window.
    """

    def __init__(self, open_rows: Callable[[], Rows], context: int) -> None:
        if context < 2:
            raise QatkitError(f"{context} leaves no token to predict", key="context", advice="use 2 or more")
        self.open_rows = open_rows
        self.context = context

    @cached_property
    def _rows(self) -> Rows:
        rows = self.open_rows()
        if rows.ends[-1] < self.context:
            raise QatkitError(
                f"{self.context} exceeds the {rows.ends[-1]} tokens of the {rows.folder.name} split",
                key="context",
                advice="use a smaller context, or more text",
            )
        return rows

    def __len__(self) -> int:
        return int(self._rows.ends[-1]) // self.context

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.context
        rows = self._rows
        tokens = rows.streams["input_ids"][start : start + self.context]
        first, last = np.searchsorted(rows.ends, [start, start + self.context], side="right")
        return window(tokens, rows.ends[first:last] - start)


def window(tokens: NDArray[np.integer], borders: NDArray[np.int64]) -> dict[str, Tensor]:
    """Return one window.

    Args:
        tokens: ``[context]``.
        borders: Offsets inside the window at which documents start, excluding 0.

    Example:
        >>> window(np.array([7, 8, 9, 5, 6]), np.array([3]))["position_ids"].tolist()
        [0, 1, 2, 0, 1]
    """
    input_ids = torch.from_numpy(tokens.astype(np.int64))
    starts = np.zeros(len(tokens), np.int64)
    inside = borders[borders < len(tokens)]
    starts[inside] = inside
    positions = np.arange(len(tokens)) - np.maximum.accumulate(starts)
    labels = input_ids.clone()
    labels[torch.from_numpy(positions == 0)] = IGNORED
    return {"input_ids": input_ids, "labels": labels, "position_ids": torch.from_numpy(positions)}
