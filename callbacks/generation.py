"""Generate training batches; the seed and the step determine which model generates and which tokens it samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import nn

from qatkit.distillation.generation import cut_prompts, generated_batch, generator_in
from qatkit.errors import QatkitError

Role = Literal["student", "teacher"]


@dataclass(frozen=True)
class Generation:
    """Train on generated continuations of a batch's sequences instead of the original sequences."""

    fraction: float | Callable[[float], float] = 1.0
    """Fraction of batches to generate, 0 to 1, or a function that returns it for training progress in [0, 1]."""
    prompt: int | None = None
    """Prompt length in tokens; None truncates each sequence before its first label."""
    new_tokens: int = 32
    """Maximum number of generated tokens."""
    temperature: float = 1.0
    """Divides the logits before sampling; 0 always picks the most probable token."""
    eos: Sequence[int] | None = None
    """End-of-sequence tokens. The default comes from the model's generation config or the data's tokenizer."""
    seed: int = 0
    """Determines which batches are generated and which tokens are sampled."""

    def __post_init__(self) -> None:
        if not callable(self.fraction) and not 0 <= self.fraction <= 1:
            raise QatkitError(f"{self.fraction} is out of range", key="fraction", advice="use a number from 0 to 1")
        for name, value in (("prompt", self.prompt), ("new_tokens", self.new_tokens)):
            if value is not None and value < 1:
                raise QatkitError(f"{value} is out of range", key=name, advice="use a positive integer")
        if self.temperature < 0:
            raise QatkitError(
                f"{self.temperature} is out of range", key="temperature", advice="use a non-negative number"
            )

    def fraction_at(self, progress: float) -> float:
        """Return the fraction of generated batches at a given training progress."""
        return self.fraction(progress) if callable(self.fraction) else self.fraction


class Generators:
    """Decide for each training batch whether student or teacher generates its sequences, and generate them.

    Args:
        on_policy: The student's generation.
        sequence_level: The teacher's generation.

    Raises:
        QatkitError: the two fractions add up to more than 1.
    """

    def __init__(self, on_policy: Generation | None, sequence_level: Generation | None) -> None:
        self.plans: dict[Role, Generation] = {}
        self.now: Role | None = None
        """The model that generated the texts of this training step."""
        if on_policy is not None:
            self.plans["student"] = on_policy
        if sequence_level is not None:
            self.plans["teacher"] = sequence_level
        fractions = [0.0 if callable(plan.fraction) else plan.fraction for plan in self.plans.values()]
        if sum(fractions) > 1:
            raise QatkitError(
                f"{fractions[0]} and sequence_level.fraction {fractions[1]} add up to more than 1",
                key="on_policy.fraction",
                advice="use two fractions that add up to at most 1",
            )

    def replace_batch(
        self,
        args: tuple[Any, ...],
        trainer: Trainer,
        progress: Callable[[Trainer], float],
        student: nn.Module,
        teacher: nn.Module,
    ) -> tuple[Any, ...]:
        """Return the arguments of a training step, with a generated batch if a model is chosen to generate it.

        Args:
            args: The batch and its index.
            trainer: The Trainer, which provides step, rank and tokenizer.
            progress: Returns the training progress in [0, 1].
            student: The student.
            teacher: The teacher.
        """
        if not self.plans:
            return args
        batch_idx = int(args[1]) if len(args) > 1 else 0
        role = self.now = self.choose(progress(trainer), trainer.global_step, batch_idx)
        if role is None:
            return args
        plan = self.plans[role]
        model = generator_in(student, "on_policy") if role == "student" else generator_in(teacher, "sequence_level")
        prompts, mask = cut_prompts(args[0], plan.prompt)
        eos = plan.eos if plan.eos is not None else eos_tokens(model, tokenizer_of(trainer))
        seed = _seed(plan.seed, trainer.global_step, batch_idx, trainer.global_rank + 1)
        batch = generated_batch(model, prompts, mask, plan.new_tokens, plan.temperature, eos, seed)
        return (batch, *args[1:])

    def choose(self, progress: float, step: int, batch_idx: int) -> Role | None:
        """Choose the model that generates a batch, the same on all processes, because sharded models run together."""
        seed = next(iter(self.plans.values())).seed
        drawn = torch.rand((), generator=torch.Generator().manual_seed(_seed(seed, step, batch_idx))).item()
        below = 0.0
        for role, plan in self.plans.items():
            below += plan.fraction_at(progress)
            if drawn < below:
                return role
        return None


def check_no_generation(on_policy: Generation | None, sequence_level: Generation | None) -> None:
    """Raise an error if a cached teacher is used with generated text.

    Raises:
        QatkitError: `on_policy` or `sequence_level` is set.
    """
    for key, plan in (("on_policy", on_policy), ("sequence_level", sequence_level)):
        if plan is not None:
            raise QatkitError(
                "a cache contains no outputs for generated text",
                key=key,
                advice=f"use a live teacher, or remove {key}",
            )


def tokenizer_of(trainer: Trainer) -> Any:
    """Return the tokenizer of the data module; None if it has none."""
    return getattr(getattr(trainer, "datamodule", None), "tokenizer", None)


def eos_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the end-of-sequence tokens from a model's generation config, or from the tokenizer."""
    tokens = model.generation_config.eos_token_id
    if tokens is None:
        tokens = getattr(tokenizer, "eos_token_id", None)
    return [] if tokens is None else list(tokens) if isinstance(tokens, (list, tuple)) else [int(tokens)]


def _seed(*numbers: int) -> int:
    return hash(numbers) % 2**63
