"""The ``distill`` block of a stage: checks, teacher and callback."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qatkit.common.device import device_type
from qatkit.distillation.cache import CachedTeacher
from qatkit.distillation.divergences import DIVERGENCES
from qatkit.distillation.features import pair_layers
from qatkit.distillation.generation import check_length
from qatkit.distillation.teacher import Teacher
from qatkit.errors import QatkitError, QatkitWarning, under
from qatkit.lora.attachment import base_layers
from qatkit.lora.bits import Bits, check_backend, quantize_base
from qatkit.recipe import DistillConfig, GenerationConfig, TrainerConfig
from qatkit.stages.layer_names import STUDENT
from qatkit.tasks.table import Task

if TYPE_CHECKING:
    from qatkit.callbacks import AttentionMatch, Generation, HiddenMatch, KnowledgeDistillation


class LowBitTeacher(Teacher):
    """A teacher whose linear layers are quantized to 8 or 4 bits when it is moved to its device.

    Args:
        model: The teacher.
        bits: Bit width of the teacher's weights.
        device: See `Teacher`.
        dtype: See `Teacher`.
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


def check(
    config: DistillConfig, trainer: TrainerConfig, student: nn.Module, teacher: nn.Module, task: Task | None
) -> None:
    """Check the block against the task that the data declares and against both models, before weights are loaded.

    Raises:
        QatkitError: the loss does not support the outputs of the task, a model cannot generate text, the cache would
            contain all classes, bitsandbytes cannot quantize the teacher, or a layer is unknown.
    """
    divergence = DIVERGENCES.row(config.loss, key="loss")
    if task is not None:
        divergence.check_kind(task.compared)
    for key, used, default in (
        ("temperature", divergence.uses_temperature, DistillConfig.temperature),
        ("beta", divergence.uses_beta, DistillConfig.beta),
    ):
        if not used and getattr(config, key) != default:
            warnings.warn(
                f"distill.{key}: {getattr(config, key)} has no effect with loss '{config.loss}'; remove the key",
                QatkitWarning,
                stacklevel=2,
            )
    for key, plan, generator in (
        ("on_policy", config.on_policy, student),
        ("sequence_level", config.sequence_level, teacher),
    ):
        if plan is not None:
            check_length(generator, key, (plan.prompt or 1) + plan.new_tokens)
    classes = getattr(getattr(teacher, "config", None), "vocab_size", None)
    if config.cache is not None and isinstance(classes, int) and config.cache.top_k >= classes:
        raise QatkitError(
            f"{config.cache.top_k} is not less than the number of teacher classes ({classes})",
            key="cache.top_k",
            advice=f"use an integer from 1 to {classes - 1}",
        )
    if config.cache is not None and task is not None and task.value_outputs:
        raise QatkitError(
            f"a cache stores only class outputs, but the task '{task.name}' also has {', '.join(task.value_outputs)}",
            key="cache",
            advice="remove the key",
        )
    if config.teacher_bits is not None:
        if not base_layers(teacher):
            raise QatkitError(
                f"the teacher has no plain linear layer to quantize to {config.teacher_bits} bits",
                key="teacher_bits",
                advice="remove teacher_bits",
            )
        try:
            check_backend(torch.device(config.teacher_device or device_type(trainer.accelerator)))
        except QatkitError as error:
            advice = "remove the key, or set teacher_device to a device that bitsandbytes supports"
            raise error.with_fields(key="teacher_bits", advice=advice) from error
    resolved(config, student, teacher)


def resolved(config: DistillConfig, student: nn.Module, teacher: nn.Module) -> DistillConfig:
    """Replace globs in ``hidden`` and ``attention`` with the names of the matching layers.

    Raises:
        QatkitError: a name or glob matches no layer.
    """
    names, theirs = ([name for name, _ in model.named_modules()] for model in (student, teacher))
    changes: dict[str, Any] = {}
    for key in ("hidden", "attention"):
        if (match := getattr(config, key)) is not None:
            with under(key):
                changes[key] = replace(match, layers=pair_layers(match.layers, names, theirs, match.layers_by))
    return replace(config, **changes)


def compared_layers(config: DistillConfig) -> list[str]:
    """Return the teacher layers whose outputs a resolved block compares."""
    matches = [match for match in (config.hidden, config.attention) if match is not None]
    return sorted({name for match in matches for name in match.layers.values()})


def teacher(config: DistillConfig, model: nn.Module) -> Teacher:
    """Wrap the model as a teacher with the block's device, dtype and bit width."""
    dtype: torch.dtype | None = getattr(torch, config.teacher_dtype) if config.teacher_dtype else None
    if config.teacher_bits is None:
        return Teacher(model, config.teacher_device, dtype)
    bits: Bits = 4 if config.teacher_bits == 4 else 8
    return LowBitTeacher(model, bits, config.teacher_device, dtype)


def callback(
    config: DistillConfig,
    teacher: Teacher | CachedTeacher,
    seed: int,
    vocab_size: int | None = None,
    task: Task | None = None,
) -> KnowledgeDistillation:
    """Return the callback that adds the distillation term to the loss."""
    from qatkit.callbacks import KnowledgeDistillation

    return KnowledgeDistillation(
        teacher,
        config.temperature,
        config.alpha,
        student=STUDENT,
        loss=_losses(config, task),
        beta=config.beta,
        hidden=_hidden(config),
        attention=_attention(config),
        ramp=config.ramp,
        vocab_size=vocab_size,
        fused=True,
        outputs=task.outputs or None if task is not None else None,
        class_dim=task.class_dim if task is not None and task.class_dim != -1 else None,
        on_policy=_generation(config.on_policy, seed),
        sequence_level=_generation(config.sequence_level, seed),
    )


def _losses(config: DistillConfig, task: Task | None) -> str | dict[str | int, str]:
    """The loss of the block, except for outputs that are values."""
    if task is None or not task.value_outputs:
        return config.loss
    return {name: "mse" if name in task.value_outputs else config.loss for name in task.outputs}


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
    return Generation(config.fraction_at, config.prompt, config.new_tokens, config.temperature, seed=seed)
