"""What a recipe's stages take in memory, told before anything is loaded."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qatkit import stages as blocks
from qatkit.advise.step_memory import Step, StepMemory, state_memory, step_memory
from qatkit.common.device import device_count, device_type
from qatkit.distillation.chunked import Head, TopKTargets, linear_kd_terms
from qatkit.distillation.divergences import DIVERGENCES
from qatkit.distillation.output_layer import output_layer
from qatkit.lora.attach import base_layers
from qatkit.lora.heads import classification_heads
from qatkit.quantization.prepare import prepare_qat
from qatkit.recipe import DistillConfig, Recipe, StageConfig, TrainerConfig
from qatkit.recipe.factories import resolve
from qatkit.run.stage_models import StageModels
from qatkit.stages.optimizers import moment_memory
from qatkit.tasks import call, mean_loss

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
BITS = {4: 4.127, 8: 8.0}
"""Bits per weight that bitsandbytes holds: those of NF4 have scales of 8 bits for 64, and scales of these for 256."""


@dataclass(frozen=True)
class Device:
    """Where a recipe trains."""

    name: str
    memory: int | None
    """Bytes that each process has; None where that is not known."""
    count: int


@dataclass(frozen=True)
class StagePlan:
    """A stage that trains, and what it takes."""

    stage: str
    memory: StepMemory
    on_each: int
    """Bytes on each device."""
    unknown: str
    """Why activations are not predicted; empty where they are."""


def device_of(trainer: TrainerConfig) -> Device:
    """The devices that Lightning will choose, and what each has."""
    kind, count = device_type(trainer.accelerator), device_count(trainer.accelerator, trainer.devices)
    if kind == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory, count)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return Device(
        kind, memory // count if memory is not None and kind != "cuda" else None, count
    )  # one machine's memory


def plan_recipe(recipe: Recipe, allow: Sequence[str] = ()) -> list[StagePlan]:
    """Predict the memory of every stage that trains; weights and data are not touched."""
    count = device_of(recipe.trainer).count
    plans = []
    for name, setting in settings(recipe, allow):
        memory, unknown = setting.memory()
        each = memory.on_each(count, recipe.trainer.strategy, setting.fused)
        plans.append(StagePlan(name, memory, each, unknown))
    return plans


@dataclass(frozen=True)
class Setting:
    """All that the memory of a stage depends on."""

    model: nn.Module
    """Plain, on the meta device."""
    teacher: nn.Module | None
    stage: StageConfig
    context: int | None
    """Tokens of a sample; None where samples are no texts."""
    autocast: torch.dtype | None
    device: str
    """Its type."""

    @property
    def fused(self) -> bool:
        """Whether distillation computes the loss inside the student's call."""
        return self.stage.distill is not None and _has_kernel(self.stage.distill)

    def memory(self) -> tuple[StepMemory, str]:
        """What is predicted, and why activations are not, where they are not."""
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
            return state_memory(model, teacher, bits, taught, moments), "the data does not say how long a sample is"
        step = text_step(self.context, self.stage.batch_size, distill)
        try:
            found = step_memory(model, step, teacher, self.autocast, self.stage.accumulate > 1, bits, taught, moments)
        except Exception as error:  # foreign code: shapes that depend on values, such as those of routed experts
            said = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            return state_memory(model, teacher, bits, taught, moments), f"a step without values fails ({said})"
        return found, ""


def settings(recipe: Recipe, allow: Sequence[str] = ()) -> Iterator[tuple[str, Setting]]:
    """The stages that train, in their order."""
    models = StageModels(recipe, allow)
    for name, stage in recipe.stages.items():
        if stage.max_steps:
            teacher = models.teacher(name) if stage.distill is not None else None
            precision, device = AUTOCAST[recipe.trainer.precision], device_type(recipe.trainer.accelerator)
            yield name, Setting(models[name], teacher, stage, _context(recipe, allow), precision, device)


def _context(recipe: Recipe, allow: Sequence[str]) -> int | None:
    """Tokens of a sample, as the data factory is told or takes for granted."""
    if "context" in recipe.data.args:
        return int(recipe.data.args["context"])
    parameters = inspect.signature(resolve(recipe.data.factory, "data.factory", allow)).parameters
    default = parameters["context"].default if "context" in parameters else None
    return default if isinstance(default, int) else None


def _held_teacher(teacher: nn.Module | None, distill: DistillConfig | None) -> nn.Module | None:
    """The teacher as far as it is on the student's device."""
    if teacher is None or distill is None or distill.cache is not None or distill.teacher_device is not None:
        return None
    teacher = copy.deepcopy(teacher)
    return teacher.to(getattr(torch, distill.teacher_dtype)) if distill.teacher_dtype else teacher


def _names_of_weights(layers: Sequence[str]) -> list[str]:
    return [f"{layer}.{part}" for layer in layers for part in ("weight", "base_layer.weight")]  # plain, or below peft's


def text_step(context: int, batch_size: int, distill: DistillConfig | None) -> Step:
    """The loss of one batch of texts as `CompressionModule` and `KnowledgeDistillation` compute it.

    Args:
        context: Tokens of a text.
        batch_size: Texts.
        distill: What is learned from a teacher; without one, from a cache.
    """

    def step(model: nn.Module, teacher: nn.Module | None) -> Tensor:
        batch = batch_for(model, batch_size, context)
        tokens, labels = batch["input_ids"], batch["labels"]
        if distill is None:
            return mean_loss(model, batch)
        layer = output_layer(model)
        theirs = output_layer(teacher) if teacher is not None else layer
        if layer is not None and theirs is not None and _has_kernel(distill):
            return _fused(model, layer, teacher, theirs, tokens, distill)
        logits = call(model, batch)
        with torch.no_grad():
            said = call(teacher.eval(), batch) if teacher is not None else torch.zeros_like(logits)
        divergence: Tensor = DIVERGENCES[distill.loss].loss(
            logits, said, temperature=distill.temperature, beta=distill.beta
        )
        loss = distill.alpha * divergence
        hard = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return loss + (1 - distill.alpha) * hard

    return step


def batch_for(model: nn.Module, batch_size: int, context: int) -> dict[str, Any]:
    """A batch of whole texts of the kind that a model is trained on: pairs, where it has no head."""
    tokens = torch.zeros(batch_size, context, dtype=torch.long)
    one = torch.zeros(batch_size, dtype=torch.long)
    if classification_heads(model):
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": one}
    head: Any = getattr(model, "get_output_embeddings", None)
    if head is not None and head() is None:
        both = torch.cat([tokens, tokens])
        mask = torch.ones_like(both)
        return {"input_ids": both, "attention_mask": mask, "labels": one, "task": "pairs", "pooling": "mean"}
    return {"input_ids": tokens, "labels": tokens}


def _fused(
    model: nn.Module,
    layer: nn.Linear,
    teacher: nn.Module | None,
    theirs: nn.Linear,
    tokens: Tensor,
    distill: DistillConfig,
) -> Tensor:
    """Both losses from the inputs of the output layers, as `qatkit.callbacks.fused` takes them."""
    batch = {"input_ids": tokens}
    layer.forward = theirs.forward = lambda input: input  # type: ignore[method-assign]  # on copies
    hidden = call(model, batch)
    rows = tokens.numel()
    if teacher is None:
        best = distill.cache.top_k if distill.cache is not None else 1
        answer: Head | TopKTargets = TopKTargets(
            torch.zeros(rows, best, dtype=torch.int32), torch.zeros(rows, best), torch.zeros(rows)
        )
    else:
        with torch.no_grad():
            answer = Head(call(teacher.eval(), batch).flatten(0, 1), theirs.weight.detach(), theirs.bias)
    student = Head(hidden.flatten(0, 1), layer.weight, layer.bias)
    counted = torch.ones(rows, dtype=torch.bool)
    how = (distill.temperature, distill.alpha, distill.loss, distill.beta)
    return linear_kd_terms(student, answer, tokens.flatten(), counted, *how).loss


def _has_kernel(distill: DistillConfig) -> bool:
    """Whether the fused loss computes this divergence."""
    divergence = DIVERGENCES[distill.loss]
    return bool(divergence.rows if distill.cache is None else divergence.top_k_rows)


def gigabytes(size: int) -> str:
    """Bytes in GB, or in MB or kB where that reads better.

    Example:
        >>> gigabytes(80_000_000_000), gigabytes(1_500_000)
        ('80.0 GB', '1.5 MB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} kB"
