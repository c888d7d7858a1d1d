"""Whether the stages of a recipe fit the device, told before anything is loaded; and what would."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.analysis.memory import Step, StepMemory, state_memory, step_memory
from qatkit.architecture import meta_model
from qatkit.distillation.losses import jsd_loss, kd_loss, log_probabilities, mse_loss, reverse_kl_loss
from qatkit.errors import QatkitError
from qatkit.factories import resolve
from qatkit.quantization.prepare import prepare_qat
from qatkit.recipe import DistillConfig, Recipe, StageConfig, TrainerConfig
from qatkit.tasks import answers, call, token_loss

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
NF4 = 4.127
"""Bits per weight of NF4 with double quantization: blocks of 64, their scales in 8 bits, those in blocks of 256."""
RANK = 16
"""Of the adapters that are offered where training all weights does not fit."""


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
    kind = trainer.accelerator
    if kind in ("auto", "gpu"):
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and torch.cuda.is_available():
        count = torch.cuda.device_count() if trainer.devices == "auto" else int(trainer.devices)
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory, count)
    count = 1 if trainer.devices == "auto" else int(trainer.devices)
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
        plans.append(StagePlan(name, memory, memory.on_each(count, recipe.trainer.strategy), unknown))
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
    rank: int | None = None
    """Train adapters of this rank, and no weights."""
    bits: float | None = None
    """Of the frozen weights below adapters."""

    def memory(self) -> tuple[StepMemory, str]:
        """What is predicted, and why activations are not, where they are not."""
        model = copy.deepcopy(self.model)
        if self.stage.quantize is not None:
            prepare_qat(model, **self.stage.quantize.arguments)
        held = {} if self.bits is None else {f"{name}.base_layer.weight": self.bits for name in _adaptable(model)}
        if self.rank is not None:
            _adapt(model, self.rank)
        if self.context is None:
            return state_memory(model, self.teacher), "the data does not say how long a sample is"
        step = text_step(self.context, self.stage.batch_size, self.stage.distill)
        try:
            return step_memory(model, step, self.teacher, self.autocast, self.stage.accumulate > 1, held), ""
        except Exception as error:  # foreign code: shapes that depend on values, such as those of routed experts
            said = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            return state_memory(model, self.teacher), f"a step without values fails ({said})"


def settings(recipe: Recipe, allow: Sequence[str] = ()) -> Iterator[tuple[str, Setting]]:
    """The stages that train, in their order."""
    model = meta_model(recipe.model, allow)
    models: dict[str | None, nn.Module] = {None: model}
    for name, stage in recipe.stages.items():
        if stage.model is not None:
            model = meta_model(stage.model, allow, f"stages.{name}.model")
        models[name] = model
        if stage.max_steps:
            teacher = models[recipe.teacher_of(name)] if stage.distill is not None else None
            yield name, Setting(model, teacher, stage, _context(recipe, allow), AUTOCAST[recipe.trainer.precision])


def _context(recipe: Recipe, allow: Sequence[str]) -> int | None:
    """Tokens of a sample, as the data factory is told or takes for granted."""
    if "context" in recipe.data.args:
        return int(recipe.data.args["context"])
    parameters = inspect.signature(resolve(recipe.data.factory, "data.factory", allow)).parameters
    default = parameters["context"].default if "context" in parameters else None
    return default if isinstance(default, int) else None


def text_step(context: int, batch_size: int, distill: DistillConfig | None) -> Step:
    """The loss of one batch of texts as `CompressionModule` and `KnowledgeDistillation` compute it.

    Without a teacher, a distilling step reads the teacher's answers from a cache, which are small.
    """

    def step(model: nn.Module, teacher: nn.Module | None) -> Tensor:
        tokens = torch.zeros(batch_size, context, dtype=torch.long)
        batch = {"input_ids": tokens, "labels": tokens}
        logits = call(model, batch)
        loss, _ = token_loss(*answers(logits, batch))
        if distill is None:
            return loss
        if teacher is None:
            apart = log_probabilities(logits, distill.temperature)[..., 0].mean()
        else:
            with torch.no_grad():
                taught = call(teacher.eval(), batch)
            apart = _divergence(logits, taught, distill, torch.ones_like(tokens, dtype=torch.bool))
        return distill.alpha * apart + (1 - distill.alpha) * loss

    return step


def _divergence(student: Tensor, teacher: Tensor, distill: DistillConfig, mask: Tensor) -> Tensor:
    if distill.loss == "mse":
        return mse_loss(student, teacher, mask)
    if distill.loss == "jsd":
        return jsd_loss(student, teacher, distill.temperature, mask, beta=distill.beta)
    return (kd_loss if distill.loss == "kl" else reverse_kl_loss)(student, teacher, distill.temperature, mask)


def _adaptable(model: nn.Module) -> list[str]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [name for name, layer in model.named_modules() if type(layer) is nn.Linear and layer is not head]


def _adapt(model: nn.Module, rank: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    names = _adaptable(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=names), model, low_cpu_mem_usage=True)


def check_fit(recipe: Recipe, plans: Sequence[StagePlan], allow: Sequence[str] = ()) -> None:
    """Refuse a stage that needs more than its device has, and name what would fit.

    Raises:
        QatkitError: with the number, and the changes with theirs.
    """
    device = device_of(recipe.trainer)
    for plan in plans:
        if device.memory is None or plan.on_each <= device.memory:
            continue
        setting = dict(settings(recipe, allow))[plan.stage]
        fitting = [
            f"{words} ({gigabytes(size)})"
            for words, size in _options(recipe, plan.stage, setting, device, allow)
            if size <= device.memory
        ]
        advice = f"write {'; or '.join(fitting)}" if fitting else "nothing that is known makes it fit: a smaller model"
        raise QatkitError(
            f"stages.{plan.stage}: training needs {gigabytes(plan.on_each)} on each device, and {device.name} has "
            f"{gigabytes(device.memory)}; {advice}; or --force"
        )


def _options(
    recipe: Recipe, stage: str, setting: Setting, device: Device, allow: Sequence[str]
) -> Iterator[tuple[str, int]]:
    """Changes of a recipe that need less, one by one and then those of them together that change no result much."""

    def size(changed: Setting) -> int:
        return changed.memory()[0].on_each(device.count, recipe.trainer.strategy)

    together, words = setting, []
    for word, change in _changes(recipe, stage, setting, allow):
        try:
            yield word, size(change(setting))
            together = change(together)
        except Exception:
            continue
        words.append(word)
    if len(words) > 1:
        yield " with ".join(words), size(together)
    if setting.stage.quantize is None and find_spec("peft") is not None:
        yield f"stages.{stage}.lora={{rank: {RANK}}}", size(replace(together, rank=RANK))
        yield f"stages.{stage}.lora={{rank: {RANK}, bits: 4}}", size(replace(together, rank=RANK, bits=NF4))


def _changes(
    recipe: Recipe, stage: str, setting: Setting, allow: Sequence[str]
) -> Iterator[tuple[str, Callable[[Setting], Setting]]]:
    if setting.context is not None and setting.stage.batch_size > 1:
        accumulate = setting.stage.batch_size * setting.stage.accumulate
        yield (
            f"stages.{stage}.batch_size=1 stages.{stage}.accumulate={accumulate}",
            lambda now: replace(now, stage=replace(now.stage, batch_size=1, accumulate=accumulate)),
        )
    if setting.context is not None and setting.autocast is None:
        yield "trainer.precision=bf16-mixed", lambda now: replace(now, autocast=torch.bfloat16)
    if setting.stage.model is None and _takes_checkpointing(recipe, allow):
        args: dict[str, Any] = {**recipe.model.args, "gradient_checkpointing": True}
        yield (
            "model.args.gradient_checkpointing=true",
            lambda now: replace(now, model=meta_model(replace(recipe.model, args=args), allow)),
        )


def _takes_checkpointing(recipe: Recipe, allow: Sequence[str]) -> bool:
    if recipe.model.args.get("gradient_checkpointing"):
        return False
    return (
        "gradient_checkpointing" in inspect.signature(resolve(recipe.model.factory, "model.factory", allow)).parameters
    )


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
