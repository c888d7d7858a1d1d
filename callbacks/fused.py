"""Cross-entropy and distillation of a causal language model without its logits.

While a training step runs, the student's output layer hands its input through, so that "logits" are hidden states; a
hook then computes both losses from these and the layer's weight, a few rows at a time, and puts them in the place of
the loss that the model would have computed itself. The teacher's output layer is left out in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from qatkit.callbacks.divergence import Divergence
from qatkit.callbacks.positions import counted, is_causal
from qatkit.callbacks.teacher_outputs import Call, Lesson
from qatkit.callbacks.teachers import asked
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.distillation.cache import CachedTeacher
from qatkit.distillation.chunked import BestClasses, Head, linear_kd_terms
from qatkit.distillation.losses import IGNORED
from qatkit.distillation.teacher import Teacher
from qatkit.distillation.vocabulary import tell_trimmed
from qatkit.errors import QatkitError
from qatkit.kernels.kd_rows import DIVERGENCES

ROWS = 256
"""Rows of logits at a time where only the best class is asked for."""
OTHERWISE = {"num_items_in_batch", "shift_labels", "logits_to_keep"}
"""Arguments of a call for which models of transformers compute another loss, or fewer logits."""


def output_layer(model: nn.Module) -> nn.Linear | None:
    """The layer that makes a causal language model's logits, where it is a plain one that nothing else looks at."""
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if get is not None else None
    config = getattr(model, "config", None)
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    return None if getattr(config, "output_router_logits", False) else layer  # experts have a loss of their own


def makes_logits(model: nn.Module, layer: nn.Linear) -> bool:
    """Whether the model's logits are what the layer returns: some models scale or cap them afterwards."""
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
    divergence: Divergence,
    outputs: Sequence[str | int] | None,
) -> Fused | str:
    """What leaves out the logits, or why they have to be made.

    Args:
        student: The model that is called.
        teacher: Live, or from a cache.
        divergence: What is compared.
        outputs: Which outputs; see `KnowledgeDistillation`.
    """
    layer = output_layer(student)
    if divergence.loss not in DIVERGENCES or outputs is not None:
        return f"loss '{divergence.loss}' and outputs {outputs} compare them"
    if not is_causal(student):
        return "the student is no causal language model, and its labels are no next tokens"
    if layer is None or not makes_logits(student, layer):
        return "those of the student do not come from a plain linear layer"
    classes, size = layer.out_features, divergence.vocab_size
    if isinstance(teacher, CachedTeacher):
        return Fused(layer, teacher, divergence) if teacher.classes == classes else "the student pads its vocabulary"
    theirs = output_layer(teacher.model)
    if theirs is None or not makes_logits(teacher.model, theirs):
        return "those of the teacher do not come from a plain linear layer"
    if classes != theirs.out_features:
        if size is None or size > min(classes, theirs.out_features):
            return "student and teacher have different numbers of classes"
        tell_trimmed(classes, theirs.out_features, size)
        classes = size
    return Fused(layer, LiveHead(teacher, theirs, classes), divergence)


class LiveHead:
    """A live teacher that answers with its last hidden states.

    Args:
        teacher: A causal language model.
        layer: Its output layer, see `output_layer`.
        classes: How many of its classes count; the others are padding.
    """

    def __init__(self, teacher: Teacher, layer: nn.Linear, classes: int) -> None:
        self.teacher = teacher
        self.layer = layer
        self.classes = classes
        self._last: tuple[Tensor, Tensor | None] | None = None

    def answer(self, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> Head:
        """For a call of the student, where the student is."""
        self.layer.forward = _identity  # type: ignore[assignment, method-assign]  # on the instance
        try:
            hidden = asked(self.teacher, tuple(args), dict(kwargs)).logits
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
    """Gives calls of a student a loss and no logits.

    Args:
        layer: The student's output layer, see `output_layer`.
        teacher: What answers.
        divergence: What is compared.
    """

    def __init__(self, layer: nn.Linear, teacher: LiveHead | CachedTeacher, divergence: Divergence) -> None:
        self.layer = layer
        self.teacher = teacher
        self.divergence = divergence
        self.labels: Tensor | None = None
        """Of the call that runs without logits."""
        self._given: Tensor | None = None
        self._checked = False

    def begin(self, args: Sequence[Any], kwargs: Mapping[str, Any], labels: Tensor | None) -> dict[str, Any] | None:
        """Before a call: the arguments to make it with, or None where it has to make logits."""
        tokens = kwargs.get("input_ids")
        usual = kwargs.get("return_dict") is not False and not OTHERWISE & set(kwargs) and not args
        if not usual or labels is None or not isinstance(tokens, Tensor) or labels.shape != tokens.shape:
            return None
        if hasattr(self.layer.weight, "full_tensor"):  # sharded apart from the model that is called
            return None
        device = tokens.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16:
            return None  # gradients are made before the loss is scaled, and would round to 0
        self.labels = labels
        self.layer.forward = _identity  # type: ignore[assignment, method-assign]  # on the instance
        return {name: value for name, value in kwargs.items() if name != "labels"}

    def end(self) -> None:
        """After a call, however it ended."""
        self.labels = None
        self.layer.__dict__.pop("forward", None)

    def finish(
        self, output: Any, args: Sequence[Any], kwargs: Mapping[str, Any], present: Tensor | None, alpha: float
    ) -> Lesson:
        """After a call: put its loss in the place of its logits.

        The loss has the value of the cross-entropy alone, and ``(1 - alpha)`` times it the gradient of
        ``alpha * divergence + (1 - alpha) * cross_entropy``: so what a training step adds to it counts as it would
        have. With an `alpha` of 1 the loss itself has that gradient.

        Args:
            output: What the student returned; its logits are hidden states.
            args: What it was called with.
            kwargs: The same by name.
            present: The attention mask.
            alpha: Weight of the divergence now.
        """
        assert self.labels is not None
        hidden = output.logits
        following = self.labels.roll(-1, dims=1)
        following[:, -1] = IGNORED  # the last logits answer to no label
        mask = counted(hidden, self.labels, present, causal=True)
        assert mask is not None
        student = Head(hidden.flatten(0, 1), self.layer.weight, self.layer.bias)
        states: Mapping[str, Tensor] = {}
        if isinstance(self.teacher, CachedTeacher):
            targets = self.teacher.answer(args, kwargs).map(lambda part: part.to(hidden.device))
            states, mask = targets.hidden, mask & targets.mask
            teacher: Head | BestClasses = BestClasses(
                targets.indices.flatten(0, 1), targets.log_p.flatten(0, 1), targets.log_tail.flatten()
            )
        else:
            teacher = self.teacher.answer(args, kwargs, hidden.device)
        how = self.divergence
        terms = linear_kd_terms(
            student, teacher, following.flatten(), mask.flatten(), how.temperature, alpha, how.loss, how.beta
        )
        self.end()
        soft, hard = terms.divergence.detach(), terms.cross_entropy.detach()
        output.logits = None
        output.loss = (terms.loss - alpha * soft) / (1 - alpha) if alpha < 1 else terms.loss - soft + hard
        self._given = output.loss
        answers = [teacher.hidden] if isinstance(teacher, Head) else []
        return Lesson([soft], [lambda: _agreement(student, teacher)], answers, states, terms)

    def total(self, calls: Sequence[Call], loss: Tensor, alpha: float) -> Tensor:
        """What is trained: the loss that a training step returned, with the distillation term.

        Args:
            calls: Of the student in this step.
            loss: What the step returned.
            alpha: Weight of the divergence now.

        Raises:
            QatkitError: the step did not just take the student's loss.
        """
        lesson = calls[-1].lesson
        if lesson is None or lesson.fused is None or len(calls) > 1:
            raise QatkitError(
                f"fused: training_step called the student {len(calls)} times, and only for one call can its loss be "
                "computed with the distillation term; write fused=False"
            )
        if not self._checked:  # once: to read the number waits for the device
            self._checked = True
            assert self._given is not None
            (factor,) = torch.autograd.grad(loss, self._given, retain_graph=True, allow_unused=True)
            if factor is None or float(factor) != 1:
                raise QatkitError(
                    f"fused: training_step multiplies the student's loss by {0 if factor is None else float(factor)}, "
                    "and with it the distillation term, which is part of it; add to the loss, or write fused=False"
                )
        self._given = None
        divergence, cross_entropy = lesson.fused.divergence.detach(), lesson.fused.cross_entropy.detach()
        return alpha * divergence + (1 - alpha) * loss if alpha < 1 else loss + divergence - cross_entropy


@torch.no_grad()
def _agreement(student: Head, teacher: Head | BestClasses) -> Tensor:
    theirs = teacher.indices[:, 0] if isinstance(teacher, BestClasses) else _best(teacher)
    return _best(student) == theirs


def _best(head: Head) -> Tensor:
    parts: Sequence[Tensor] = torch.split(head.hidden, ROWS)
    best = [F.linear(part.to(head.weight.dtype), head.weight, head.bias).argmax(dim=-1) for part in parts]
    return torch.cat(best)


def _identity(hidden: Tensor) -> Tensor:
    return hidden
