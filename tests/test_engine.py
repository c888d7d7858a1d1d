"""The pipeline's LightningModule: its schedule, its optimizer groups, its random numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qatkit import QuantSpec, prepare_qat
from qatkit.engine import SCALE_LR, lr_factor, parameter_groups


@pytest.mark.parametrize(
    ("progress", "schedule", "warmup", "factor"),
    [
        (0.0, "cosine", 0.0, 1.0),
        (0.25, "cosine", 0.0, 0.5 * (1 + 0.5**0.5)),
        (1.0, "cosine", 0.0, 0.0),
        (0.5, "linear", 0.0, 0.5),
        (0.9, "constant", 0.0, 1.0),
        (0.05, "cosine", 0.1, 0.5),
        (0.55, "linear", 0.1, 0.5),
        (1.0, "constant", 1.0, 1.0),
    ],
)
def test_the_learning_rate_rises_over_the_warmup_and_then_follows_its_schedule(
    progress: float, schedule: str, warmup: float, factor: float
) -> None:
    assert lr_factor(progress, schedule, warmup) == pytest.approx(factor)  # type: ignore[arg-type]


def test_weight_decay_is_for_matrices_and_scales_move_slower() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    prepare_qat(model, QuantSpec(4, observer="lsq"))
    matrices, vectors, scales = parameter_groups(model, lr=0.1, weight_decay=0.5)
    assert ([p.dim() for p in matrices["params"]], matrices["weight_decay"]) == ([2, 2], 0.5)
    assert ([p.dim() for p in vectors["params"]], vectors["weight_decay"]) == ([1, 1, 1, 1], 0.0)
    assert (scales["weight_decay"], scales["lr"]) == (0.0, 0.1 * SCALE_LR)
    assert [p.shape for p in scales["params"]] == [torch.Size([8, 1]), torch.Size([2, 1])]


def test_frozen_parameters_are_in_no_group() -> None:
    model = nn.Linear(4, 2)
    model.bias.requires_grad_(False)
    assert len(parameter_groups(model, 0.1, 0.0)) == 1
