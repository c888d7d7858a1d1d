"""Text pairs: each text is matched with its own partner among all partners in the batch (InfoNCE).

The first half of a batch's rows are texts; the second half are their partners in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qatkit.errors import QatkitError, did_you_mean
from qatkit.tasks.labels import labels_in

TEMPERATURE = 0.05
"""Divides the cosine similarities (Gao et al. 2021, "SimCSE", section 3)."""
POOLINGS = ("mean", "cls", "last")


def answers(hidden: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the scaled similarity of each text to each partner, ``[texts, partners]``, and its own partner's index."""
    first, second = F.normalize(pooled(hidden, batch["attention_mask"], batch["pooling"]), dim=-1).chunk(2)
    return first @ second.T / TEMPERATURE, labels_in(batch)


def pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool hidden states into one float32 embedding per text, ``[rows, width]``.

    Args:
        hidden: ``[rows, tokens, width]``.
        mask: The attention mask ``[rows, tokens]``.
        pooling: "mean", "cls" (the first token) or "last".

    Raises:
        QatkitError: the pooling is unknown.
    """
    if pooling not in POOLINGS:
        raise QatkitError(f"unknown pooling '{pooling}'", key="pooling", advice=did_you_mean(pooling, POOLINGS))
    if pooling == "mean":
        weights = mask.unsqueeze(-1).float()
        return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
    index = mask.sum(1) - 1 if pooling == "last" else torch.zeros_like(mask[:, 0])
    return hidden.float()[torch.arange(len(hidden), device=hidden.device), index]
