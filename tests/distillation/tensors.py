"""Tensors that are the same on every machine and in every version of torch: sines, not a generator's numbers."""

from __future__ import annotations

import torch
from torch import Tensor

BATCH, LENGTH, VOCABULARY, WIDTH = 3, 5, 37, 8
LABELS = (torch.arange(BATCH * LENGTH) * 7 % VOCABULARY).view(BATCH, LENGTH)
LABELS[0, 3:] = -100
LABELS[2, 0] = -100


def sines(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Numbers from -scale to scale that repeat nowhere, float32."""
    count = torch.Size(shape).numel()
    return (scale * torch.sin(torch.arange(count, dtype=torch.float64) * (1.3 + seed) ** 2)).view(shape).float()


def logits(seed: int) -> Tensor:
    """``[batch, length, vocabulary]``."""
    return sines(seed, BATCH, LENGTH, VOCABULARY, scale=4.0)


def hidden(seed: int) -> Tensor:
    """``[batch * length, width]``."""
    return sines(seed + 10, BATCH * LENGTH, WIDTH)


def weight(seed: int) -> Tensor:
    """``[vocabulary, width]``."""
    return sines(seed + 20, VOCABULARY, WIDTH, scale=2.0)
