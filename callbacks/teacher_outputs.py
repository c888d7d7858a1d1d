"""What a teacher says to one call of the student: live, or from a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qatkit.callbacks.divergence import Divergence
from qatkit.callbacks.outputs import logits_of
from qatkit.callbacks.positions import counted
from qatkit.callbacks.teachers import asked
from torch import Tensor

from qatkit.distillation.cache import CachedTeacher
from qatkit.distillation.chunked import Terms
from qatkit.distillation.teacher import Teacher
from qatkit.errors import QatkitError


@dataclass(frozen=True)
class Lesson:
    """One call's distillation."""

    divergences: list[Tensor]
    """One for each output that is compared."""
    agreements: list[Callable[[], Tensor]]
    """Tell where student and teacher name the same class."""
    answers: list[Tensor] = field(default_factory=list)
    """What a live teacher said, to be looked at for NaN."""
    states: Mapping[str, Tensor] = field(default_factory=dict)
    """What it computed inside, where a cache holds that."""
    fused: Terms | None = None
    """Where the student's loss was computed with the distillation term."""


@dataclass(frozen=True)
class Call:
    """One call of the student in a training step."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    states: dict[str, Tensor]
    """What the student computed inside."""
    labels: Tensor | None
    present: Tensor | None
    """The attention mask."""
    lesson: Lesson | None = None
    """Where the teacher has answered already."""


def live_lesson(
    teacher: Teacher, call: Call, divergence: Divergence, outputs: Sequence[str | int] | None, causal: bool
) -> Lesson:
    """Ask the teacher.

    Args:
        teacher: Gets the inputs of the call.
        call: Of the student.
        divergence: What is compared.
        outputs: Which outputs; see `KnowledgeDistillation`.
        causal: Whether logits answer to the next label.

    Raises:
        QatkitError: the outputs do not fit.
    """
    lesson = Lesson([], [])
    answer = asked(teacher, call.args, call.kwargs)
    for student, said in zip(logits_of(call.output, outputs), logits_of(answer, outputs), strict=True):
        lesson.answers.append(said)
        ours, theirs = divergence.trimmed(student, said.to(student.device))
        lesson.divergences.append(divergence(ours, theirs, counted(ours, call.labels, call.present, causal)))
        lesson.agreements.append(lambda s=ours, t=theirs: s.argmax(dim=-1) == t.argmax(dim=-1))  # type: ignore[misc]
    return lesson


def cached_lesson(
    cache: CachedTeacher, call: Call, divergence: Divergence, outputs: Sequence[str | int] | None, causal: bool
) -> Lesson:
    """Look up what the teacher said; arguments as of `live_lesson`.

    Raises:
        QatkitError: a sample is not in the cache, or the outputs do not fit.
    """
    (logits, *others) = logits_of(call.output, outputs)
    if others:
        raise QatkitError(f"outputs: {outputs} are several, and a cache holds one; write one, or take a live teacher")
    targets = cache.answer(call.args, call.kwargs).map(lambda part: part.to(logits.device))
    ours, fitting = divergence.fitted(logits, targets, cache)
    mask = counted(ours, call.labels, call.present, causal)
    return Lesson(
        [divergence.from_cache(ours, fitting, mask)],
        [lambda: ours.argmax(dim=-1) == fitting.indices[..., 0]],
        states=fitting.hidden,
    )
