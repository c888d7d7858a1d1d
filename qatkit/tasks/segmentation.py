"""Dense prediction, such as segmentation: one class per pixel, with batches of inputs and labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.tasks.labels import labels_of


def answers(logits: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Reshape logits ``[N, classes, ...]`` to ``[pixels, classes]``, and labels ``[N, ...]`` to ``[pixels]``.

    Labels may have a class dimension of size 1, ``[N, 1, ...]``.
    """
    labels = labels_of(batch)
    if labels.dim() == logits.dim() and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if logits.dim() < 3 or labels.shape != (len(logits), *logits.shape[2:]):
        raise QatkitError(
            f"labels of shape {list(labels.shape)} do not match logits of shape {list(logits.shape)}",
            key="data",
            advice="return logits [N, classes, ...] and use one label per pixel, [N, ...]",
        )
    return logits.movedim(1, -1).flatten(0, -2), labels.flatten().long()
