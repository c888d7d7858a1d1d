"""Check that a recipe's stages fit into device memory, and suggest changes if they do not."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from qatkit.advise.plan import Device, Setting, StagePlan, device_of, settings
from qatkit.common.units import format_bytes
from qatkit.distillation.divergences import DIVERGENCES
from qatkit.errors import QatkitError
from qatkit.recipe import CacheConfig, LoraConfig, Recipe, StageConfig
from qatkit.recipe.factories import resolve
from qatkit.run.architecture import meta_model


def check_fit(recipe: Recipe, plans: Sequence[StagePlan], allow: Sequence[str] = ()) -> None:
    """Raise an error if a stage needs more memory than its device has.

    Raises:
        QatkitError: a stage does not fit; the error lists its predicted memory use and the changes that would make it
            fit.
    """
    device = device_of(recipe.trainer)
    for plan in plans:
        if device.memory is None or plan.on_each <= device.memory:
            continue
        setting = dict(settings(recipe, allow))[plan.stage]
        fitting = [
            f"{words} ({format_bytes(size)})"
            for words, size in _options(recipe, plan.stage, setting, device, allow)
            if size <= device.memory
        ]
        advice = f"set {'; or '.join(fitting)}" if fitting else "use a smaller model; no other change makes it fit"
        raise QatkitError(
            f"training needs {format_bytes(plan.on_each)} per device, but {device.name} has "
            f"{format_bytes(device.memory)}",
            key=f"stages.{plan.stage}",
            advice=f"{advice}; or use --force",
        )


def _options(
    recipe: Recipe, stage: str, setting: Setting, device: Device, allow: Sequence[str]
) -> Iterator[tuple[str, int]]:
    """Changes to a recipe that save memory: one by one, then all that hardly change the result together."""

    def size(changed: Setting) -> int:
        return changed.memory()[0].on_each(device.count, recipe.trainer.strategy, changed.fused)

    together, words = setting, []
    for word, change in _changes(recipe, stage, setting, allow):
        try:
            yield word, size(change(setting))
            together = change(together)
        except QatkitError:
            continue
        words.append(word)
    if len(words) > 1:
        yield " with ".join(words), size(together)
    for word, lora in _adapters(recipe, setting.stage):
        with contextlib.suppress(QatkitError):  # the model has no linear layers for adapters
            only_lora, everything = (
                replace(part, stage=replace(part.stage, lora=lora)) for part in (setting, together)
            )
            word = f"stages.{stage}.{word}"
            yield word, size(only_lora)
            if words:
                yield " with ".join([*words, word]), size(everything)


def _adapters(recipe: Recipe, stage: StageConfig) -> Iterator[tuple[str, LoraConfig]]:
    """LoRA with fewer trained parameters, or a quantized base model, if the stage allows it."""
    if stage.prune is not None:
        return
    if stage.lora is None:
        yield "lora='{rank: 16}'", LoraConfig()
    if stage.quantize is not None or recipe.trainer.strategy == "fsdp2":  # neither works with a 4-bit base model
        return
    if stage.lora is None:
        yield "lora='{rank: 16, bits: 4}'", LoraConfig(bits=4)
    elif stage.lora.bits is None:
        yield "lora.bits=4", replace(stage.lora, bits=4)


def _changes(
    recipe: Recipe, stage: str, setting: Setting, allow: Sequence[str]
) -> Iterator[tuple[str, Callable[[Setting], Setting]]]:
    if setting.context is not None and setting.stage.batch_size > 1:
        accumulate = setting.stage.batch_size * setting.stage.accumulate
        yield (
            f"stages.{stage}.batch_size=1 stages.{stage}.accumulate={accumulate}",
            lambda now: replace(now, stage=replace(now.stage, batch_size=1, accumulate=accumulate)),
        )
    distill = setting.stage.distill
    if setting.teacher is not None and distill is not None and DIVERGENCES[distill.loss].on_top_k:
        cached = replace(distill, cache=CacheConfig(), teacher_bits=None, on_policy=None)
        if distill.cache is None and distill.on_policy is None:
            yield (
                f"stages.{stage}.distill.cache={{}}",
                lambda now: replace(now, stage=replace(now.stage, distill=cached)),
            )
    if setting.context is not None and setting.autocast is None:
        yield "trainer.precision=bf16-mixed", lambda now: replace(now, autocast=torch.bfloat16)
    if setting.stage.optimizer == "adamw" and setting.stage.lora is None and recipe.trainer.strategy != "fsdp2":
        yield (
            f"stages.{stage}.optimizer=adamw8bit",
            lambda now: replace(now, stage=replace(now.stage, optimizer="adamw8bit")),
        )
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
