"""Measure the bytes of tensors while the pipeline trains a stage of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from qatkit import stages as blocks
from qatkit.distillation.cache import CachedTeacher
from qatkit.pipeline.module import CompressionModule
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.teachers import TeacherSpec, teacher_spec
from qatkit.pipeline.training import train
from qatkit.recipe import Recipe
from qatkit.run.folder import Run

RECIPE = """
name: tiny
model: {factory: "qatkit.models:llama", args: {vocab_size: 300, hidden: 96, layers: 3, heads: 4, kv_heads: 2,
  intermediate: 256, context: 64}}
data: {factory: "qatkit.data:stdlib_text", args: {vocab_size: 300, context: 64, include: ["email/*"],
  val_fraction: 0.2, test_fraction: 0.1}}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 3, batch_size: 4}
  qat:
    max_steps: 3
    batch_size: 4
    distill: {temperature: 2.0, alpha: 0.7}
    quantize: {scheme: W8A8, observer: lsq, exclude: [lm_head]}
"""


def measured(recipe: Recipe, stage: str, folder: Path) -> int:
    """Peak of the CPU allocator while a stage trains, including the weights from before its first step."""
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    before = 0

    def start(self: CompressionModule) -> None:
        nonlocal before
        before = sum({part.data_ptr(): part.nbytes() for model in models for part in _storages(model)}.values())
        profiler.start()

    def stop(self: CompressionModule) -> None:
        profiler.stop()

    run = Run(recipe, folder)
    model = run.build_model()
    distill = recipe.stages[stage].distill
    spec = None
    if distill is not None and distill.cache is not None:
        run_stages(run, until=recipe.teacher_of(stage))
        spec = teacher_spec(run, stage, first_process=True)
        assert isinstance(spec.teacher, CachedTeacher)
    elif distill is not None:
        spec = TeacherSpec(distill, blocks.distill.teacher(distill, run.build_model()), None)
    models = [model] if spec is None or isinstance(spec.teacher, CachedTeacher) else [model, spec.teacher.model]
    folder.mkdir(parents=True, exist_ok=True)
    with (
        patch.object(CompressionModule, "on_train_start", start),
        patch.object(CompressionModule, "on_train_end", stop),
    ):
        train(recipe, stage, model, spec, run.build_data, folder, [])
    now = peak = 0
    events: list[Any] = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 0, "the profiler saw no allocation"
    return before + peak


def _storages(model: nn.Module) -> Iterator[torch.UntypedStorage]:
    """Storages of the local parameters and buffers, and of the scales of bitsandbytes."""
    for module in model.modules():
        held: list[Any] = [*module._parameters.values(), *module._buffers.values()]
        for weight in list(module._parameters.values()):
            state = getattr(weight, "quant_state", None)  # of 4 bits
            for part in (state, getattr(state, "state2", None)):
                held += vars(part).values() if part is not None else ()
            held += [getattr(weight, "CB", None), getattr(weight, "SCB", None)]  # of 8
        for tensor in held:
            if isinstance(tensor, Tensor):
                yield getattr(tensor, "_local_tensor", tensor).untyped_storage()
