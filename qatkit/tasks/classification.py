"""Classification: one class per sample, from a pair of inputs and labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def answers(logits: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Return logits ``[batch, classes]`` and labels ``[batch]`` as they are."""
    return logits, batch[1]
