"""Fused cross-entropy and distillation of a causal language model, without materializing its logits.

During a training step, the student's output layer returns its input, so the "logits" are hidden states. A hook computes
both losses from these and the layer's weight, a few rows at a time, and replaces the loss that the model would have
computed. The teacher's output layer is bypassed in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from qatkit.callbacks.divergence import DistillationLoss
from qatkit.callbacks.outputs import ComparedOutputs
from qatkit.callbacks.positions import counted_positions, is_causal
from qatkit.callbacks.teacher_outputs import Call, TeacherOutputs
from qatkit.callbacks.teachers import call_teacher
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.common.labels import IGNORED
from qatkit.distillation.cache import CachedTeacher
from qatkit.distillation.chunked import Head, TopKTargets, linear_kd_terms
from qatkit.distillation.output_layer import output_layer
from qatkit.distillation.teacher import Teacher
from qatkit.distillation.vocabulary import log_trimmed
from qatkit.errors import QatkitError

ROWS = 256
"""Number of logit rows computed at a time if only the argmax is needed."""
UNSUPPORTED = {"num_items_in_batch", "shift_labels", "logits_to_keep"}
"""Call arguments that make transformers models compute a different loss or fewer logits."""


def returns_logits_of(model: nn.Module, layer: nn.Linear) -> bool:
    """Whether the model returns the layer's output unchanged as logits; some models scale or cap it."""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        with torch.no_grad(), isolate_rng():
            tokens = torch.zeros(1, 2, dtype=torch.long, device=layer.weight.device)
            logits = getattr(model(input_ids=tokens), "logits", None)
    finally:
        hook.remove()
    return isinstance(logits, Tensor) and len(seen) == 1 and torch.equal(logits.float(), seen[0].float())


def fused(
    student: nn.Module,
    teacher: Teacher | CachedTeacher,
    loss: DistillationLoss,
    compared: ComparedOutputs,
) -> Fused | str:
    """Return the fused loss for student and teacher, or the reason why logits must be materialized.

    Args:
        student: The model that is called in training.
        teacher: A live or cached teacher.
        loss: The distillation loss.
        compared: The outputs to compare.
    """
    layer = output_layer(student)
    cached = isinstance(teacher, CachedTeacher)
    if not (loss.row.top_k_rows if cached else loss.row.rows):
        return f"loss '{loss.loss}' has no fused kernel{' for a cached teacher' if cached else ''}"
    if compared.keys is not None:
        return f"outputs {list(compared.keys)} are compared"
    if not is_causal(student):
        return "the student is not a causal language model"
    if layer is None or not returns_logits_of(student, layer):
        return "the student's logits are not the output of a plain linear layer"
    classes, size = layer.out_features, loss.vocab_size
    if isinstance(teacher, CachedTeacher):
        return Fused(layer, teacher, loss) if teacher.classes == classes else "the student pads its vocabulary"
    theirs = output_layer(teacher.model)
    if theirs is None or not returns_logits_of(teacher.model, theirs):
        return "the teacher's logits are not the output of a plain linear layer"
    if classes != theirs.out_features:
        if size is None or size > min(classes, theirs.out_features):
            return "the student and the teacher have different numbers of classes"
        log_trimmed(classes, theirs.out_features, size)
        classes = size
    return Fused(layer, LiveHead(teacher, theirs, classes), loss)


class LiveHead:
    """A live teacher that returns its last hidden states.

    Args:
        teacher: A causal language model.
        layer: Its output layer; see `output_layer`.
        classes: Number of classes without padding.
    """

    def __init__(self, teacher: Teacher, layer: nn.Linear, classes: int) -> None:
        self.teacher = teacher
        self.layer = layer
        self.classes = classes
        self._last: tuple[Tensor, Tensor | None] | None = None

    def head_for(self, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> Head:
        """Return the teacher's head for one student call, on the student's device."""
        self.layer.forward = _identity  # type: ignore[assignment, method-assign]  # on the instance
        try:
            hidden = call_teacher(self.teacher, tuple(args), dict(kwargs)).logits
        finally:
            self.layer.__dict__.pop("forward", None)
        if self._last is None:
            bias = self.layer.bias
            self._last = (
                self.layer.weight.detach()[: self.classes].to(device),
                None if bias is None else bias.detach()[: self.classes].to(device),
            )
        return Head(hidden.to(device).flatten(0, 1), *self._last)


class Fused:
    """Compute the loss of student calls without materializing logits.

    Args:
        layer: The student's output layer; see `output_layer`.
        teacher: A live or cached teacher.
        loss: The distillation loss.
    """

    def __init__(self, layer: nn.Linear, teacher: LiveHead | CachedTeacher, loss: DistillationLoss) -> None:
        self.layer = layer
        self.teacher = teacher
        self.loss = loss
        self.labels: Tensor | None = None
        """Labels of the running call, if it runs without logits."""
        self._given: Tensor | None = None
        self._checked = False

    def begin(self, args: Sequence[Any], kwargs: Mapping[str, Any], labels: Tensor | None) -> dict[str, Any] | None:
        """Prepare a call and return its new arguments, or None if the call must return logits."""
        tokens = kwargs.get("input_ids")
        usual = kwargs.get("return_dict") is not False and not UNSUPPORTED & set(kwargs) and not args
        if not usual or labels is None or not isinstance(tokens, Tensor) or labels.shape != tokens.shape:
            return None
        if hasattr(self.layer.weight, "full_tensor"):  # sharded separately from the model that is called
            return None
        device = tokens.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16:
            return None  # gradients are computed before the loss is scaled, so they would underflow
        self.labels = labels
        self.layer.forward = _identity  # type: ignore[assignment, method-assign]  # on the instance
        return {name: value for name, value in kwargs.items() if name != "labels"}

    def end(self) -> None:
        """Restore the output layer after a call."""
        self.labels = None
        self.layer.__dict__.pop("forward", None)

    def finish(
        self, output: Any, args: Sequence[Any], kwargs: Mapping[str, Any], present: Tensor | None, alpha: float
    ) -> TeacherOutputs:
        """Finish a call by setting the output's loss and replacing its logits with None.

        The value of the loss is the cross-entropy. ``(1 - alpha)`` times the loss has the gradient of ``alpha *
        divergence + (1 - alpha) * cross_entropy``, so terms that a training step adds keep their weight. With
        ``alpha=1``, the loss itself has that gradient.

        Args:
            output: The student's output; its logits are hidden states.
            args: Positional inputs of the call.
            kwargs: Keyword inputs of the call.
            present: The attention mask.
            alpha: Current weight of the divergence.
        """
        assert self.labels is not None
        hidden = output.logits
        following = self.labels.roll(-1, dims=1)
        following[:, -1] = IGNORED  # the logits at the last position predict no label
        mask = counted_positions(hidden, self.labels, present, causal=True)
        assert mask is not None
        student = Head(hidden.flatten(0, 1), self.layer.weight, self.layer.bias)
        states: Mapping[str, Tensor] = {}
        if isinstance(self.teacher, CachedTeacher):
            targets = self.teacher.outputs_for(args, kwargs).map(lambda part: part.to(hidden.device))
            states, mask = targets.hidden, mask & targets.mask
            teacher: Head | TopKTargets = TopKTargets(
                targets.indices.flatten(0, 1), targets.log_p.flatten(0, 1), targets.log_tail.flatten()
            )
        else:
            teacher = self.teacher.head_for(args, kwargs, hidden.device)
        loss = self.loss
        terms = linear_kd_terms(
            student, teacher, following.flatten(), mask.flatten(), loss.temperature, alpha, loss.loss, loss.beta
        )
        self.end()
        soft, hard = terms.divergence.detach(), terms.cross_entropy.detach()
        output.logits = None
        output.loss = (terms.loss - alpha * soft) / (1 - alpha) if alpha < 1 else terms.loss - soft + hard
        self._given = output.loss
        outputs: list[tuple[Tensor, Tensor | None]] = []
        if isinstance(teacher, Head):
            outputs.append((teacher.hidden, mask.flatten()))
        return TeacherOutputs([soft], [lambda: _agreement(student, teacher)], outputs, states, terms)

    def total(self, calls: Sequence[Call], loss: Tensor, alpha: float) -> Tensor:
        """Return the training loss: the loss that a training step returned, combined with the distillation term.

        Args:
            calls: Student calls in this step.
            loss: The loss that the step returned.
            alpha: Current weight of the divergence.

        Raises:
            QatkitError: the step called the student more than once, or scaled its loss.
        """
        outputs = calls[-1].teacher_outputs
        if outputs is None or outputs.fused is None or len(calls) > 1:
            raise QatkitError(
                f"training_step called the student {len(calls)} times, but the fused loss requires exactly one call",
                key="fused",
                advice="use fused=False",
            )
        if not self._checked:  # read only once, because reading the factor waits for the device
            self._checked = True
            assert self._given is not None
            (factor,) = torch.autograd.grad(loss, self._given, retain_graph=True, allow_unused=True)
            if factor is None or float(factor) != 1:
                raise QatkitError(
                    "training_step multiplies the student's loss, and the distillation term in it, by "
                    f"{0 if factor is None else float(factor)}",
                    key="fused",
                    advice="return the loss unscaled, or use fused=False",
                )
        self._given = None
        divergence, cross_entropy = outputs.fused.divergence.detach(), outputs.fused.cross_entropy.detach()
        return alpha * divergence + (1 - alpha) * loss if alpha < 1 else loss + divergence - cross_entropy


@torch.no_grad()
def _agreement(student: Head, teacher: Head | TopKTargets) -> Tensor:
    theirs = teacher.indices[:, 0] if isinstance(teacher, TopKTargets) else _argmax(teacher)
    return _argmax(student) == theirs


def _argmax(head: Head) -> Tensor:
    parts: Sequence[Tensor] = torch.split(head.hidden, ROWS)
    best = [F.linear(part.to(head.weight.dtype), head.weight, head.bias).argmax(dim=-1) for part in parts]
    return torch.cat(best)


def _identity(hidden: Tensor) -> Tensor:
    return hidden
