"""Training batches that student or teacher write: whose turn it is and what is drawn depend on seed and step alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import nn

from qatkit.distillation.generation import cut_prompts, generated_batch, writer_in
from qatkit.errors import QatkitError

Writer = Literal["student", "teacher"]


@dataclass(frozen=True)
class Generation:
    """Continuations of the batch's texts, written while training and trained on instead of the texts."""

    fraction: float | Callable[[float], float] = 1.0
    """Share of the batches, 0 to 1; or a function of the training's progress in [0, 1]."""
    prompt: int | None = None
    """Tokens that are kept of a text; None keeps those before the first that has a label."""
    new_tokens: int = 32
    """Tokens that are written at most."""
    temperature: float = 1.0
    """Divides the logits before a token is drawn; 0 takes the most probable one."""
    eos: Sequence[int] | None = None
    """Tokens that end a text; by default those of the model's generation config, else of the data's tokenizer."""
    seed: int = 0
    """Decides which batches and what is drawn."""

    def __post_init__(self) -> None:
        if not callable(self.fraction) and not 0 <= self.fraction <= 1:
            raise QatkitError(f"fraction: {self.fraction} is out of range; write a number from 0 to 1")
        for name, value in (("prompt", self.prompt), ("new_tokens", self.new_tokens)):
            if value is not None and value < 1:
                raise QatkitError(f"{name}: {value} is out of range; write a number of at least 1")
        if self.temperature < 0:
            raise QatkitError(f"temperature: {self.temperature} is out of range; write 0 or a number above 0")

    def share(self, progress: float) -> float:
        """Share of the batches at a point of training."""
        return self.fraction(progress) if callable(self.fraction) else self.fraction


class Writers:
    """Decides for every training batch who writes its texts, and lets it write.

    Args:
        on_policy: What the student writes.
        sequence_level: What the teacher writes.

    Raises:
        QatkitError: together they want more than all batches.
    """

    def __init__(self, on_policy: Generation | None, sequence_level: Generation | None) -> None:
        self.plans: dict[Writer, Generation] = {}
        self.now: Writer | None = None
        """Who wrote the texts of this training step."""
        if on_policy is not None:
            self.plans["student"] = on_policy
        if sequence_level is not None:
            self.plans["teacher"] = sequence_level
        shares = [0.0 if callable(plan.fraction) else plan.fraction for plan in self.plans.values()]
        if sum(shares) > 1:
            raise QatkitError(
                f"on_policy.fraction: {shares[0]} and sequence_level.fraction: {shares[1]} are more than all batches; "
                "write two numbers whose sum is at most 1"
            )

    def rewritten(
        self,
        args: tuple[Any, ...],
        trainer: Trainer,
        progress: Callable[[Trainer], float],
        student: nn.Module,
        teacher: nn.Module,
    ) -> tuple[Any, ...]:
        """The arguments of a training step, with other texts in their batch where it is somebody's turn to write.

        Args:
            args: The batch and its number.
            trainer: Says where training is.
            progress: Of training, from the trainer.
            student: The one model.
            teacher: The other.
        """
        if not self.plans:
            return args
        batch_idx = int(args[1]) if len(args) > 1 else 0
        who = self.now = self.whose(progress(trainer), trainer.global_step, batch_idx)
        if who is None:
            return args
        plan = self.plans[who]
        model = writer_in(student, "on_policy") if who == "student" else writer_in(teacher, "sequence_level")
        prompts, mask = cut_prompts(args[0], plan.prompt)
        eos = plan.eos if plan.eos is not None else ends_of(model, tokenizer_of(trainer))
        seed = _seed(plan.seed, trainer.global_step, batch_idx, trainer.global_rank + 1)
        batch = generated_batch(model, prompts, mask, plan.new_tokens, plan.temperature, eos, seed)
        return (batch, *args[1:])

    def whose(self, progress: float, step: int, batch_idx: int) -> Writer | None:
        """Who writes a batch; the same on every process, as sharded models must run together."""
        seed = next(iter(self.plans.values())).seed
        drawn = torch.rand((), generator=torch.Generator().manual_seed(_seed(seed, step, batch_idx))).item()
        below = 0.0
        for who, plan in self.plans.items():
            below += plan.share(progress)
            if drawn < below:
                return who
        return None


def refuse_plans(on_policy: Generation | None, sequence_level: Generation | None) -> None:
    """Refuse texts that a cache cannot know.

    Raises:
        QatkitError: there is a plan.
    """
    for key, plan in (("on_policy", on_policy), ("sequence_level", sequence_level)):
        if plan is not None:
            raise QatkitError(f"{key}: a cache knows only the data's texts; pass the teacher itself, or leave it out")


def tokenizer_of(trainer: Trainer) -> Any:
    """The tokenizer that a data module may have."""
    return getattr(getattr(trainer, "datamodule", None), "tokenizer", None)


def ends_of(writer: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text of a model of transformers."""
    found = writer.generation_config.eos_token_id
    if found is None:
        found = getattr(tokenizer, "eos_token_id", None)
    return [] if found is None else list(found) if isinstance(found, (list, tuple)) else [int(found)]


def _seed(*numbers: int) -> int:
    return hash(numbers) % 2**63
