"""Predict memory use for each stage of a recipe, before anything is loaded."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qatkit import stages as blocks
from qatkit.advise.step_memory import StepMemory, state_memory, step_memory
from qatkit.advise.text_step import has_fused_loss, text_step
from qatkit.common.device import device_count, device_type
from qatkit.lora.attachment import base_layers
from qatkit.quantization.prepare import prepare_qat
from qatkit.recipe import DistillConfig, Recipe, StageConfig, TrainerConfig
from qatkit.recipe.factories import resolve
from qatkit.run.stage_models import StageModels
from qatkit.stages.optimizers import moment_memory
from qatkit.tasks import Task, declared_task

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
BITS = {4: 4.127, 8: 8.0}
"""Bits per weight in bitsandbytes. NF4 stores an 8-bit scale per 64 weights, and a float32 scale per 256 scales."""


@dataclass(frozen=True)
class Device:
    """The devices that a recipe uses for training."""

    name: str
    memory: int | None
    """Bytes per process; None if unknown."""
    count: int


@dataclass(frozen=True)
class StagePlan:
    """The predicted memory of a stage that trains."""

    stage: str
    memory: StepMemory
    on_each: int
    """Peak bytes per device."""
    unknown: str
    """The reason why activations are not predicted; empty if they are."""


def device_of(trainer: TrainerConfig) -> Device:
    """Return the devices that Lightning will choose, and the memory of each."""
    kind, count = device_type(trainer.accelerator), device_count(trainer.accelerator, trainer.devices)
    if kind == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory, count)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    per_process = memory // count if memory is not None and kind != "cuda" else None  # all on one machine
    return Device(kind, per_process, count)


def plan_recipe(recipe: Recipe, allow: Sequence[str] = ()) -> list[StagePlan]:
    """Predict memory use for every stage that trains, without loading weights or data."""
    count = device_of(recipe.trainer).count
    plans = []
    for name, setting in settings(recipe, allow):
        memory, unknown = setting.memory()
        each = memory.on_each(count, recipe.trainer.strategy, setting.fused)
        plans.append(StagePlan(name, memory, each, unknown))
    return plans


@dataclass(frozen=True)
class Setting:
    """Everything that the memory use of a stage depends on."""

    model: nn.Module
    """The model with plain layers, on the meta device."""
    teacher: nn.Module | None
    stage: StageConfig
    context: int | None
    """Tokens per sample; None if samples are not text."""
    autocast: torch.dtype | None
    device: str
    """The device type, such as "cuda"."""
    task: Task | None
    """The task that the data declares."""

    @property
    def fused(self) -> bool:
        """Whether distillation computes the loss inside the student's forward pass."""
        return self.stage.distill is not None and has_fused_loss(self.stage.distill)

    def memory(self) -> tuple[StepMemory, str]:
        """Return the prediction, and the reason why activations are not predicted (empty if they are)."""
        model, teacher = copy.deepcopy(self.model), _held_teacher(self.teacher, self.stage.distill)
        lora, distill = self.stage.lora, self.stage.distill
        bits: dict[str, float] = {}
        if lora is not None and lora.bits is not None:
            bits = dict.fromkeys(_names_of_weights(base_layers(model)), BITS[lora.bits])
        if self.stage.quantize is not None:
            prepare_qat(model, **self.stage.quantize.arguments)
        if lora is not None:
            blocks.lora.attach_to(model, lora, held=())
        taught: dict[str, float] = {}
        if teacher is not None and distill is not None and distill.teacher_bits is not None:
            taught = dict.fromkeys(_names_of_weights(base_layers(teacher)), BITS[distill.teacher_bits])
        moments = moment_memory(self.stage.optimizer, model, self.device)
        if self.context is None:
            unknown = "the data factory has no 'context' argument, so the sample length is unknown"
            return state_memory(model, teacher, bits, taught, moments), unknown
        step = text_step(self.context, self.stage.batch_size, distill, self.task)
        accumulates = self.stage.accumulate > 1
        try:
            return step_memory(model, step, teacher, self.autocast, accumulates, bits, taught, moments), ""
        except Exception as error:  # third-party code may raise anything where shapes depend on values
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            unknown = f"a training step on meta tensors failed ({reason})"
            return state_memory(model, teacher, bits, taught, moments), unknown


def settings(recipe: Recipe, allow: Sequence[str] = ()) -> Iterator[tuple[str, Setting]]:
    """The stages that train, in recipe order."""
    models = StageModels(recipe, allow)
    task = declared_task(resolve(recipe.data.factory, "data.factory", allow))
    for name, stage in recipe.stages.items():
        if stage.max_steps:
            teacher = models.teacher(name) if stage.distill is not None else None
            precision, device = AUTOCAST[recipe.trainer.precision], device_type(recipe.trainer.accelerator)
            yield name, Setting(models[name], teacher, stage, context_of(recipe, allow), precision, device, task)


def context_of(recipe: Recipe, allow: Sequence[str]) -> int | None:
    """Return the tokens per sample: the data factory's argument ``context``, or its default."""
    if "context" in recipe.data.args:
        return int(recipe.data.args["context"])
    parameters = inspect.signature(resolve(recipe.data.factory, "data.factory", allow)).parameters
    default = parameters["context"].default if "context" in parameters else None
    return default if isinstance(default, int) else None


def _held_teacher(teacher: nn.Module | None, distill: DistillConfig | None) -> nn.Module | None:
    """The teacher in the form it has on the student's device; None if it is not on that device."""
    if teacher is None or distill is None or distill.cache is not None or distill.teacher_device is not None:
        return None
    teacher = copy.deepcopy(teacher)
    return teacher.to(getattr(torch, distill.teacher_dtype)) if distill.teacher_dtype else teacher


def _names_of_weights(layers: Sequence[str]) -> list[str]:
    return [
        f"{layer}.{part}" for layer in layers for part in ("weight", "base_layer.weight")
    ]  # plain, or wrapped by peft
