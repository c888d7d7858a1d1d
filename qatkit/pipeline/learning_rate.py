"""Learning rates: the schedule of a stage, and parameter groups with separate learning rates and weight decay."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from qatkit.recipe import ScheduleName
from qatkit.stages.optimizers import learned_scales

SCALE_LR = 0.2
"""Fraction of the learning rate used for learned scales. The size of an Adam step is about the learning rate regardless
of the gradient, and scales are several times smaller than weights.
"""


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Create parameter groups: matrices, vectors (without weight decay) and learned scales (also with a lower rate).

    Example:
        >>> groups = parameter_groups(nn.Linear(4, 2), lr=1e-3, weight_decay=0.01)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.01), (1, 0.0)]
    """
    scales = learned_scales(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = [parameter for parameter in trained if id(parameter) not in scales]
    groups = [
        {"params": [p for p in weights if p.dim() >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in weights if p.dim() < 2], "lr": lr, "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in scales], "lr": lr * SCALE_LR, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def lr_factor(progress: float, schedule: ScheduleName, warmup: float = 0.0, decay: float = 0.2) -> float:
    """Return the learning rate at a given progress of the stage, as a fraction of its peak.

    Args:
        progress: The completed fraction of the stage, 0 to 1.
        schedule: Shape after the warmup: cosine to 0, linear to 0, constant, or ("wsd") constant with a final decay of
            ``1 - sqrt(completed fraction of the decay)``; Hägele et al. (2024), "Scaling Laws and Compute-Optimal
            Training Beyond Fixed Training Durations", equation 1.
        warmup: The fraction of the stage over which the rate rises from 0.
        decay: The final fraction of the stage, over which "wsd" decays to 0.

    Example:
        >>> lr_factor(0.5, "cosine")
        0.5
    """
    if progress < warmup:
        return progress / warmup
    if schedule == "wsd":
        fallen = 1 - (1 - min(progress, 1.0)) / decay
        return 1 - math.sqrt(fallen) if fallen > 0 else 1.0
    rest = min((progress - warmup) / (1 - warmup), 1.0) if warmup < 1 else 1.0
    if schedule == "cosine":
        return round(0.5 * (1 + math.cos(math.pi * rest)), 12)
    return 1 - rest if schedule == "linear" else 1.0
