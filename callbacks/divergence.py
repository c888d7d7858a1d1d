"""How far a student's outputs are from its teacher's, and NaN among the teacher's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from qatkit.distillation.cache import CachedTeacher
from qatkit.distillation.losses import check_beta, jsd_loss, kd_loss, mse_loss, reverse_kl_loss
from qatkit.distillation.sparse import sparse_kd_loss
from qatkit.distillation.store import Targets
from qatkit.distillation.vocabulary import trim_to_vocabulary
from qatkit.errors import QatkitError

LOSSES = ("kl", "reverse_kl", "jsd", "mse")
EVERY = 50
"""Optimizer steps between two looks for NaN on a device that would have to be waited for."""


@dataclass(frozen=True)
class Divergence:
    """Which divergence, and its numbers."""

    loss: str
    temperature: float
    beta: float
    vocab_size: int | None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise QatkitError(f"temperature: {self.temperature} is out of range; write a number above 0")
        if self.loss not in LOSSES:
            raise QatkitError(f"loss: '{self.loss}' is unknown; write one of {list(LOSSES)}")
        check_beta(self.beta)

    def trimmed(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Logits without the padding of their vocabularies.

        Raises:
            QatkitError: the shapes differ all the same.
        """
        if student.shape[:-1] == teacher.shape[:-1] and self.vocab_size is not None:
            student, teacher = trim_to_vocabulary(student, teacher, self.vocab_size)
        if student.shape != teacher.shape:
            raise QatkitError(
                f"teacher: its outputs have shape {list(teacher.shape)}, the student's {list(student.shape)}; they "
                "must be equal. Where both use one tokenizer and only pad their logits differently, write "
                "vocab_size=len(tokenizer)"
            )
        return student, teacher

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """The mean over the positions that count.

        Args:
            student: Outputs ``[..., classes]`` as `trimmed` returns them.
            teacher: The same of the teacher.
            mask: True where a position counts.

        Raises:
            QatkitError: the outputs are no probabilities of classes.
        """
        if self.loss == "mse":
            return mse_loss(student, teacher, mask)
        if student.dim() < 2 or student.shape[-1] == 1:
            raise QatkitError(
                f"loss: '{self.loss}' compares probabilities of classes, and outputs of shape {list(student.shape)} "
                "have no two; write loss='mse'"
            )
        if self.loss == "jsd":
            return jsd_loss(student, teacher, self.temperature, mask, beta=self.beta)
        return (kd_loss if self.loss == "kl" else reverse_kl_loss)(student, teacher, self.temperature, mask)

    def from_cache(self, student: Tensor, targets: Targets, mask: Tensor | None) -> Tensor:
        """The same from what a cache holds of the teacher.

        Args:
            student: Logits as `fitted` returns them.
            targets: For the same positions.
            mask: True where a position counts.
        """
        held = targets.mask if mask is None else targets.mask & mask
        return sparse_kd_loss(student, targets.indices, targets.log_p, targets.log_tail, self.temperature, held)

    def fitted(self, student: Tensor, targets: Targets, cache: CachedTeacher) -> tuple[Tensor, Targets]:
        """A student's logits and what the cache holds of its teacher, position by position.

        Args:
            student: Logits ``[samples, length, classes]`` or ``[samples, classes]``.
            targets: For the same samples.
            cache: Where they are from.

        Raises:
            QatkitError: they do not fit.
        """
        if student.dim() == 2:
            targets = targets.map(lambda part: part.squeeze(1))
        if student.shape[-1] > cache.classes == self.vocab_size:
            student = student[..., : self.vocab_size]
        if student.shape != (*targets.mask.shape, cache.classes):
            raise QatkitError(
                f"teacher cache: it holds answers of shape {[*targets.mask.shape, cache.classes]}, and the student's "
                f"outputs have {list(student.shape)}; they must be equal. Where both use one tokenizer and only pad "
                "their logits differently, write vocab_size=len(tokenizer) in both places"
            )
        return student, targets

    def check_cache(self, cache: CachedTeacher) -> None:
        """Raise unless a cache can give this divergence.

        Raises:
            QatkitError: names what does not fit.
        """
        if self.loss != "kl":
            raise QatkitError(
                f"loss: '{self.loss}' needs all of the teacher's outputs, and a cache holds its best classes; "
                "write loss='kl'"
            )
        if cache.temperature != self.temperature:
            raise QatkitError(
                f"temperature: {self.temperature}, and the cache in {cache.folder} was made with {cache.temperature}; "
                f"write temperature={cache.temperature} or make another cache"
            )


class NanWatch:
    """Remembers the first training batch for which a teacher answered NaN."""

    def __init__(self) -> None:
        self._found: Tensor | None = None

    def note(self, trainer: Trainer, answer: Tensor) -> None:
        """Look at an answer; on the device, as to ask it would make every step wait.

        Raises:
            QatkitError: it holds NaN, and it is on the CPU.
        """
        if self._found is None:
            self._found = torch.full((), -1, dtype=torch.int64, device=answer.device)
        batch = trainer.fit_loop.total_batch_idx
        self._found = torch.where((self._found < 0) & answer.isnan().any(), batch, self._found)
        if self._found.device.type == "cpu":
            self.check()

    def after_batch(self, trainer: Trainer) -> None:
        """Check now and then.

        Raises:
            QatkitError: as `check`.
        """
        # elsewhere than on the CPU, reading the number waits for the device
        if self._found is not None and (self._found.device.type == "cpu" or trainer.global_step % EVERY == 0):
            self.check()

    def check(self) -> None:
        """Raise if there was a NaN.

        Raises:
            QatkitError: names the batch.
        """
        if self._found is not None and self._found >= 0:
            batch, self._found = int(self._found), None
            raise QatkitError(
                f"teacher: its outputs for training batch {batch}, counted from 0, hold NaN; check that batch for "
                "empty or overlong inputs, and the precision: a teacher trained in bf16 overflows in fp16"
            )
