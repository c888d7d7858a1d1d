"""The teacher of a stage: a live model, or the cache of its outputs."""

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
class TeacherSpec:
    """A stage's teacher and the distillation settings."""

    block: DistillConfig
    """The ``distill`` block, with globs replaced by layer names."""
    teacher: Teacher | CachedTeacher
    vocab_size: int | None
    """Size of the shared vocabulary, if student and teacher pad their logits to different widths."""


def teacher_spec(run: Run, stage: str, first_process: bool) -> TeacherSpec:
    """Load the teacher of a stage, or open its cache; rank 0 writes the cache if it does not exist.

    Args:
        run: The recipe and its folder.
        stage: A stage with a ``distill`` block.
        first_process: Whether this process is rank 0, which writes files.

    Raises:
        QatkitError: the cache has a different fingerprint, or the two models do not share a vocabulary.
    """
    distill = resolved_block(run, stage)
    if distill.cache is None:
        models = run.stage_models()
        data = run.build_data(run.recipe.stages[stage].batch_size)
        size = vocabulary(models[stage], models.teacher(stage), data, stage)
        model = run.load_model(run.recipe.teacher_of(stage))
        return TeacherSpec(distill, blocks.distill.teacher(distill, model), size)
    if first_process:
        write_cache(run, stage)
    else:
        wait_for(cache_folder(run, stage))
    cached, size = open_cache(run, stage)
    return TeacherSpec(distill, cached, size)
