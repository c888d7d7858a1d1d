"""Teacher outputs for one student call, from a live teacher or from a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qatkit.callbacks.divergence import DistillationLoss
from qatkit.callbacks.outputs import ComparedOutputs
from qatkit.callbacks.positions import counted_positions
from qatkit.callbacks.teachers import call_teacher
from torch import Tensor

from qatkit.distillation.cache import CachedTeacher
from qatkit.distillation.chunked import Terms
from qatkit.distillation.teacher import Teacher
from qatkit.errors import QatkitError


@dataclass(frozen=True)
class TeacherOutputs:
    """Teacher outputs for one student call, compared with the student's outputs."""

    losses: list[Tensor]
    """The weighted distillation loss of each compared output; their sum is the loss of the call."""
    agreements: list[Callable[[], Tensor]]
    """Functions that return a tensor that is True where student and teacher predict the same class."""
    outputs: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    """Outputs of a live teacher ``[..., size]`` with the positions to include, for the check for NaN."""
    states: Mapping[str, Tensor] = field(default_factory=dict)
    """Cached hidden states by layer name."""
    fused: Terms | None = None
    """The terms of a loss computed without materializing logits."""


@dataclass(frozen=True)
class Call:
    """One student call in a training step."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    states: dict[str, Tensor]
    """The student's recorded features by layer name."""
    labels: Tensor | None
    present: Tensor | None
    """The attention mask of the sequence that the logits belong to."""
    read: Tensor | None
    """The attention mask of the model's input: `present`, unless the model is an encoder-decoder."""
    batch: Any = None
    """The batch of the step."""
    teacher_outputs: TeacherOutputs | None = None
    """Teacher outputs computed during the call."""

    def present_in(self, layer: str) -> Tensor | None:
        """Return the attention mask of the tokens that a layer processes."""
        return self.read if "encoder" in layer.split(".") else self.present


def live_teacher_outputs(
    teacher: Teacher, call: Call, losses: Sequence[DistillationLoss], compared: ComparedOutputs, causal: bool
) -> TeacherOutputs:
    """Call the teacher, and compare its outputs with the student's.

    Args:
        teacher: The teacher, called with the inputs of the student.
        call: The student call.
        losses: The distillation loss of each compared output.
        compared: The outputs to compare.
        causal: Whether logits predict the next label.

    Raises:
        QatkitError: the shapes of the outputs do not match.
    """
    result = TeacherOutputs([], [])
    answer = call_teacher(teacher, call.args, call.kwargs)
    ours_theirs = (compared.select(output, call.batch, call.present) for output in (call.output, answer))
    for student, other, weight, loss in zip(*ours_theirs, compared.weights, losses, strict=True):
        labels = compared.fit_labels(call.labels, student, loss.row.compares_classes)
        ours, theirs = loss.trimmed(student, other.to(student.device))
        mask = counted_positions(ours, labels, call.present, causal)
        result.outputs.append((other, mask))
        result.losses.append(weight * loss(ours, theirs, mask))
        result.agreements.append(lambda s=ours, t=theirs: s.argmax(dim=-1) == t.argmax(dim=-1))  # type: ignore[misc]
    return result


def cached_teacher_outputs(
    cache: CachedTeacher, call: Call, loss: DistillationLoss, compared: ComparedOutputs, causal: bool
) -> TeacherOutputs:
    """Look up teacher outputs and compare them with the student's using one loss; see `live_teacher_outputs`.

    Raises:
        QatkitError: a sample is not in the cache, or the shapes of the outputs do not match.
    """
    (logits, *others) = compared.select(call.output, call.batch, call.present)
    if others:
        raise QatkitError(
            f"{list(compared.keys or ())} lists multiple outputs, but a cache contains only one",
            key="outputs",
            advice="list one output, or use a live teacher",
        )
    labels = compared.fit_labels(call.labels, logits, loss.row.compares_classes)
    targets = cache.outputs_for(call.args, call.kwargs).map(lambda part: part.to(logits.device))
    ours, fitting = loss.fitted(logits, targets, cache)
    mask = counted_positions(ours, labels, call.present, causal)
    return TeacherOutputs(
        [compared.weights[0] * loss.from_cache(ours, fitting, mask)],
        [lambda: ours.argmax(dim=-1) == fitting.indices[..., 0]],
        states=fitting.hidden,
    )
