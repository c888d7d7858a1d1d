"""The ``distill`` block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from qatkit.blocks.names import STUDENT
from qatkit.recipe import DistillConfig

if TYPE_CHECKING:
    from qatkit.callbacks import KnowledgeDistillation


def callback(config: DistillConfig, teacher: nn.Module) -> KnowledgeDistillation:
    """What adds the teacher to the loss."""
    from qatkit.callbacks import KnowledgeDistillation

    return KnowledgeDistillation(
        teacher,
        config.temperature,
        config.alpha,
        student=STUDENT,
        loss=config.loss,
        beta=config.beta,
        ramp=config.ramp,
        fused=True,
    )
