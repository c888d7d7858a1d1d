"""The distillation loss of a training step, and the check for NaN in teacher outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from qatkit.distillation.cache import CachedTeacher
from qatkit.distillation.divergences import DIVERGENCES, Divergence
from qatkit.distillation.losses import check_beta
from qatkit.distillation.store import Targets
from qatkit.distillation.vocabulary import trim_to_vocabulary
from qatkit.errors import QatkitError

EVERY = 50
"""Optimizer steps between checks for NaN on devices where a check forces a synchronization."""
PADDED_ALIKE = "pass vocab_size=len(tokenizer) if both use the same tokenizer but pad their logits differently"


@dataclass(frozen=True)
class DistillationLoss:
    """A distillation loss and its settings."""

    loss: str
    """A name in `DIVERGENCES`."""
    temperature: float
    beta: float
    vocab_size: int | None
    """Number of tokens in the shared tokenizer. Required if student and teacher pad their logits differently."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise QatkitError(f"{self.temperature} is out of range", key="temperature", advice="use a positive number")
        DIVERGENCES.row(self.loss, key="loss")
        check_beta(self.beta)

    @property
    def row(self) -> Divergence:
        """The divergence's row in the table."""
        return DIVERGENCES[self.loss]

    def trimmed(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Trim vocabulary padding from both sets of logits.

        Raises:
            QatkitError: the shapes still differ.
        """
        if student.shape[:-1] == teacher.shape[:-1] and self.vocab_size is not None:
            student, teacher = trim_to_vocabulary(student, teacher, self.vocab_size)
        if student.shape != teacher.shape:
            raise QatkitError(
                f"the teacher's outputs have shape {list(teacher.shape)}, the student's {list(student.shape)}",
                key="teacher",
                advice=PADDED_ALIKE,
            )
        return student, teacher

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """The mean over the included positions.

        Args:
            student: Outputs ``[..., classes]`` as `trimmed` returns them.
            teacher: The teacher's outputs of the same shape.
            mask: True at positions to include.

        Raises:
            QatkitError: the outputs have fewer than two classes.
        """
        if self.row.compares_classes and (student.dim() < 2 or student.shape[-1] == 1):
            regressions = ", ".join(f"loss='{name}'" for name, row in DIVERGENCES.items() if not row.compares_classes)
            raise QatkitError(
                f"'{self.loss}' compares class probabilities, but outputs of shape {list(student.shape)} have "
                "fewer than two classes",
                key="loss",
                advice=f"use {regressions}",
            )
        loss: Tensor = self.row.loss(student, teacher, mask, temperature=self.temperature, beta=self.beta)
        return loss

    def from_cache(self, student: Tensor, targets: Targets, mask: Tensor | None) -> Tensor:
        """Return the mean loss over the included positions, computed from cached teacher outputs.

        Args:
            student: Logits in the layout returned by `fitted`.
            targets: Cached outputs for the same positions.
            mask: True at positions to include.
        """
        cached = targets.mask if mask is None else targets.mask & mask
        top_k = targets.indices, targets.log_p, targets.log_tail
        loss: Tensor = self.row.top_k_loss(student, top_k, cached, temperature=self.temperature, beta=self.beta)
        return loss

    def fitted(self, student: Tensor, targets: Targets, cache: CachedTeacher) -> tuple[Tensor, Targets]:
        """Align student logits with cached teacher outputs.

        Args:
            student: Logits ``[samples, length, classes]`` or ``[samples, classes]``.
            targets: Cached outputs of the same samples.
            cache: The cache that contains the outputs.

        Raises:
            QatkitError: their shapes differ.
        """
        if student.dim() == 2:
            targets = targets.map(lambda part: part.squeeze(1))
        if student.shape[-1] > cache.classes == self.vocab_size:
            student = student[..., : self.vocab_size]
        if student.shape != (*targets.mask.shape, cache.classes):
            raise QatkitError(
                f"the cache contains outputs of shape {[*targets.mask.shape, cache.classes]}, but the student's have "
                "shape "
                f"{list(student.shape)}",
                key="teacher cache",
                advice=f"{PADDED_ALIKE}, both here and when you write the cache",
            )
        return student, targets

    def check_cache(self, cache: CachedTeacher) -> None:
        """Raise an error if a cache is not compatible with the loss.

        Raises:
            QatkitError: the loss needs full teacher outputs, or the temperatures differ.
        """
        self.row.check_cached()
        if cache.temperature != self.temperature:
            raise QatkitError(
                f"{self.temperature} differs from the temperature {cache.temperature} of the cache in {cache.folder}",
                key="temperature",
                advice=f"use temperature={cache.temperature}, or write a new cache",
            )


def losses_of(
    loss: str | Mapping[str | int, str],
    keys: Sequence[str | int] | None,
    temperature: float,
    beta: float,
    vocab_size: int | None,
) -> list[DistillationLoss]:
    """Return the loss of each compared output.

    Args:
        loss: Name of the loss for all outputs, or a mapping from outputs to loss names.
        keys: Keys or indices of the compared outputs; None compares a single output.
        temperature: See `DistillationLoss`.
        beta: See `DistillationLoss`.
        vocab_size: See `DistillationLoss`.

    Raises:
        QatkitError: a loss is unknown, or the keys of `loss` are not exactly those in `keys`.
    """
    if isinstance(loss, Mapping) and set(loss) != set(keys or ()):
        raise QatkitError(
            f"this mapping lists the outputs {list(loss)}, but the compared outputs are {list(keys or ())}",
            key="loss",
            advice="use the same names in both, such as outputs={'boxes': 0.2, 'scores': 1.0} and "
            "loss={'boxes': 'mse', 'scores': 'kl'}",
        )
    names = [loss] if isinstance(loss, str) and keys is None else [_named(loss, key) for key in keys or ()]
    return [DistillationLoss(name, temperature, beta, vocab_size) for name in names]


def _named(loss: str | Mapping[str | int, str], key: str | int) -> str:
    return loss[key] if isinstance(loss, Mapping) else loss


class NanWatch:
    """Remember the first training batch for which the teacher returned NaN."""

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def note(self, trainer: Trainer, output: Tensor, mask: Tensor | None) -> None:
        """Record on the output's device whether the output contains NaN; reading the result would stall every step.

        Args:
            trainer: The Trainer, which provides the batch index.
            output: Teacher output ``[..., size]``.
            mask: True at positions to include ``[...]``; None includes all.

        Raises:
            QatkitError: the output contains NaN and is on the CPU.
        """
        if self._first is None:
            self._first = torch.full((), -1, dtype=torch.int64, device=output.device)
        batch = trainer.fit_loop.total_batch_idx
        nan = output.isnan() if mask is None else output.isnan() & mask.to(output.device).unsqueeze(-1)
        self._first = torch.where((self._first < 0) & nan.any(), batch, self._first)
        if self._first.device.type == "cpu":
            self.check()

    def after_batch(self, trainer: Trainer) -> None:
        """Check after every batch on the CPU, and every `EVERY` steps on other devices.

        Raises:
            QatkitError: as in `check`.
        """
        if self._first is not None and (self._first.device.type == "cpu" or trainer.global_step % EVERY == 0):
            self.check()

    def check(self) -> None:
        """Raise an error if an output contained NaN.

        Raises:
            QatkitError: the teacher returned NaN; the message identifies the batch.
        """
        if self._first is not None and self._first >= 0:
            batch, self._first = int(self._first), None
            raise QatkitError(
                f"the teacher's outputs for training batch {batch} (counting from 0) contain NaN",
                key="teacher",
                advice="check that batch for empty or overlong inputs, and the precision: a teacher trained in bf16 "
                "can overflow in fp16",
            )
