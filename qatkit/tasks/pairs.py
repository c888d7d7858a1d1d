"""Pairs: each text is matched with its own partner among all partners of its batch (InfoNCE).

The first half of a batch's rows are texts, the second half their partners in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qatkit.tasks.labels import labels_in

TEMPERATURE = 0.05
"""Divides the cosine similarities; Gao et al. (2021), "SimCSE", section 3."""


def answers(hidden: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the scaled similarity of each text to each partner, ``[texts, partners]``, and its own partner's index."""
    first, second = F.normalize(pooled(hidden, batch), dim=-1).chunk(2)
    return first @ second.T / TEMPERATURE, labels_in(batch)


def pooled(hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Pool hidden states into one float32 embedding per text, ``[rows, width]``.

    Args:
        hidden: ``[rows, tokens, width]``.
        batch: ``attention_mask`` marks the tokens of each text; ``pooling`` is "mean", "cls" (first token) or "last".
    """
    mask: Tensor = batch["attention_mask"]
    if batch["pooling"] == "mean":
        weights = mask.unsqueeze(-1).float()
        return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
    index = mask.sum(1) - 1 if batch["pooling"] == "last" else torch.zeros_like(mask[:, 0])
    return hidden.float()[torch.arange(len(hidden), device=hidden.device), index]
