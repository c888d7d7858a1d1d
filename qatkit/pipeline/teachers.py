"""Who teaches a stage of a recipe: a model, or the cache of what it said of the training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qatkit import stages as blocks
from qatkit.distillation.cache import CachedTeacher
from qatkit.pipeline.teacher_cache import cache_folder, open_cache, resolved_block, wait_for, write_cache
from qatkit.pipeline.vocabulary import vocabulary
from qatkit.recipe import DistillConfig
from qatkit.run.folder import Run

if TYPE_CHECKING:
    from qatkit.distillation.teacher import Teacher


@dataclass(frozen=True)
class Teaching:
    """What a stage learns from."""

    block: DistillConfig
    """With a name for every layer that is compared."""
    teacher: Teacher | CachedTeacher
    vocab_size: int | None
    """Tokens that student and teacher share, where their logits are padded to different widths."""


def teaching(run: Run, stage: str, first_process: bool) -> Teaching:
    """The teacher of a stage; one process makes the cache where the recipe wants one that is not there.

    Args:
        run: The recipe and its folder.
        stage: One with a distill block.
        first_process: Whether this process writes.

    Raises:
        QatkitError: the cache is of something else, or the two models do not share a vocabulary.
    """
    distill = resolved_block(run, stage)
    if distill.cache is None:
        models = run.stage_models()
        data = run.build_data(run.recipe.stages[stage].batch_size)
        size = vocabulary(models[stage], models.teacher(stage), data, stage)
        model = run.load_model(run.recipe.teacher_of(stage))
        return Teaching(distill, blocks.distill.teacher(distill, model), size)
    if first_process:
        write_cache(run, stage)
    else:
        wait_for(cache_folder(run, stage))
    cached, size = open_cache(run, stage)
    return Teaching(distill, cached, size)
