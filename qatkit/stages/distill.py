"""The ``distill`` block."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qatkit.common.device import device_type
from qatkit.distillation.cache import CachedTeacher
from qatkit.distillation.features import pair_layers
from qatkit.distillation.generation import check_length
from qatkit.distillation.teacher import Teacher
from qatkit.errors import QatkitError
from qatkit.lora.attach import base_layers
from qatkit.lora.bits import Bits, check_backend, quantize_base
from qatkit.recipe import DistillConfig, GenerationConfig, TrainerConfig
from qatkit.stages.layer_names import STUDENT

if TYPE_CHECKING:
    from qatkit.callbacks import AttentionMatch, Generation, HiddenMatch, KnowledgeDistillation


class LowBitTeacher(Teacher):
    """A teacher whose linear layers are held in 8 or 4 bits from the moment it is where it answers.

    Args:
        model: The teacher.
        bits: Of the weights.
        device: As in `Teacher`.
        dtype: As in `Teacher`.
    """

    def __init__(
        self, model: nn.Module, bits: Bits, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__(model, device, dtype)
        self.bits = bits
        self._packed = False

    def to(self, device: torch.device) -> LowBitTeacher:
        super().to(device)
        if not self._packed:
            quantize_base(self.model, base_layers(self.model), self.bits)
            self._packed = True
        return self


def check(config: DistillConfig, trainer: TrainerConfig, student: nn.Module, teacher: nn.Module) -> None:
    """Check what can be known of the two models before a weight is read."""
    for key, plan, writer in (
        ("on_policy", config.on_policy, student),
        ("sequence_level", config.sequence_level, teacher),
    ):
        if plan is not None:
            check_length(writer, key, (plan.prompt or 1) + plan.new_tokens)
    if config.teacher_bits is not None:
        if not base_layers(teacher):
            raise QatkitError(
                f"teacher_bits: the teacher has no plain linear layer to hold in {config.teacher_bits} bits"
            )
        device = torch.device(config.teacher_device or device_type(trainer.accelerator))
        try:
            check_backend(device)
        except QatkitError as error:
            said = str(error).partition("; write")[0]
            raise QatkitError(f"teacher_{said}; leave teacher_bits out, or write a device that it supports") from error
    resolved(config, student, teacher)


def resolved(config: DistillConfig, student: nn.Module, teacher: nn.Module) -> DistillConfig:
    """The block with a name for every layer that it compares, where it has globs.

    Raises:
        QatkitError: a name or glob matches no layer.
    """
    names, theirs = ([name for name, _ in model.named_modules()] for model in (student, teacher))
    found: dict[str, Any] = {}
    for key in ("hidden", "attention"):
        if (match := getattr(config, key)) is not None:
            try:
                layers = pair_layers(match.layers, names, theirs, match.layers_by)
            except QatkitError as error:
                raise QatkitError(f"{key}.{error}") from None
            found[key] = replace(match, layers=layers)
    return replace(config, **found)


def compared_layers(config: DistillConfig) -> list[str]:
    """The teacher's layers whose outputs a resolved block compares."""
    matches = [match for match in (config.hidden, config.attention) if match is not None]
    return sorted({name for match in matches for name in match.layers.values()})


def teacher(config: DistillConfig, model: nn.Module) -> Teacher:
    """The model as the block wants it held."""
    dtype: torch.dtype | None = getattr(torch, config.teacher_dtype) if config.teacher_dtype else None
    if config.teacher_bits is None:
        return Teacher(model, config.teacher_device, dtype)
    bits: Bits = 4 if config.teacher_bits == 4 else 8
    return LowBitTeacher(model, bits, config.teacher_device, dtype)


def callback(
    config: DistillConfig, teacher: Teacher | CachedTeacher, seed: int, vocab_size: int | None = None
) -> KnowledgeDistillation:
    """What adds the teacher to the loss."""
    from qatkit.callbacks import KnowledgeDistillation

    return KnowledgeDistillation(
        teacher,
        config.temperature,
        config.alpha,
        student=STUDENT,
        loss=config.loss,
        beta=config.beta,
        hidden=_hidden(config),
        attention=_attention(config),
        ramp=config.ramp,
        vocab_size=vocab_size,
        fused=True,
        on_policy=_generation(config.on_policy, seed),
        sequence_level=_generation(config.sequence_level, seed),
    )


def _hidden(config: DistillConfig) -> HiddenMatch | None:
    from qatkit.callbacks import HiddenMatch

    if config.hidden is None:
        return None
    widths = None if config.hidden.widths is None else (config.hidden.widths[0], config.hidden.widths[1])
    return HiddenMatch(config.hidden.layers, config.hidden.weight, config.hidden.loss, widths, config.hidden.layers_by)


def _attention(config: DistillConfig) -> AttentionMatch | None:
    from qatkit.callbacks import AttentionMatch

    match = config.attention
    return None if match is None else AttentionMatch(match.layers, match.weight, match.heads, match.layers_by)


def _generation(config: GenerationConfig | None, seed: int) -> Generation | None:
    from qatkit.callbacks import Generation

    if config is None:
        return None
    return Generation(config.share, config.prompt, config.new_tokens, config.temperature, seed=seed)
