"""The ``distill`` block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from qatkit.blocks.names import STUDENT
from qatkit.distillation.generation import check_length
from qatkit.recipe import DistillConfig, GenerationConfig

if TYPE_CHECKING:
    from qatkit.callbacks import Generation, KnowledgeDistillation


def check(config: DistillConfig, student: nn.Module, teacher: nn.Module) -> None:
    """Check that those can write texts who are to."""
    for key, plan, model in (
        ("on_policy", config.on_policy, student),
        ("sequence_level", config.sequence_level, teacher),
    ):
        if plan is not None:
            check_length(model, key, (plan.prompt or 1) + plan.new_tokens)


def callback(config: DistillConfig, teacher: nn.Module, seed: int) -> KnowledgeDistillation:
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
        on_policy=_generation(config.on_policy, seed),
        sequence_level=_generation(config.sequence_level, seed),
    )


def _generation(config: GenerationConfig | None, seed: int) -> Generation | None:
    from qatkit.callbacks import Generation

    if config is None:
        return None
    return Generation(config.share, config.prompt, config.new_tokens, config.temperature, seed=seed)
