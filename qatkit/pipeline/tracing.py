"""Trace the first training steps of a stage, or forward passes, with torch.profiler."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from typing_extensions import override

from qatkit import stages as blocks
from qatkit.callbacks.batches import first_batches
from qatkit.common.device import check_accelerator, device_type
from qatkit.errors import QatkitError, did_you_mean
from qatkit.pipeline.teacher_cache import resolved_block
from qatkit.pipeline.teachers import TeacherSpec
from qatkit.pipeline.training import train
from qatkit.pipeline.vocabulary import vocabulary
from qatkit.quantization import linear
from qatkit.quantization.modules import FakeQuantize
from qatkit.recipe import FactoryConfig
from qatkit.run.architecture import Architecture, architecture_of
from qatkit.run.folder import Run
from qatkit.run.stage_models import starting_model
from qatkit.tasks import call

WARM = 2
"""Steps before those that are traced."""
TRACED = 5
_RANGE = "fake quantization"
_BACKWARD = tuple(
    f"_{name}Backward" for name in ("FakeQuantize", "FakeQuantizeWithin", "Coded", "RoundScale", "RoundZeroPoint")
)
_METHODS = ("quantized", "grid")
"""The methods of a fake quantizer that compute; a linear layer quantizes its weight by functions of its own."""


@dataclass(frozen=True)
class Operator:
    """An operator with its average in a step."""

    name: str
    calls: float
    seconds: float
    """Without the operators that it calls."""


@dataclass(frozen=True)
class Trace:
    """Where the time of a step goes."""

    what: str
    """"training step" or "forward pass"."""
    stage: str | None
    device: str
    steps: int
    seconds: float
    """Time of a step, which includes the overhead of the profiler."""
    busy: float
    """Sum of the operators' times in a step."""
    fake_quantization: float
    """Seconds per step in fake quantizers, forward and backward."""
    operators: list[Operator]
    """The slowest operator first."""


class _Traced(Exception):
    """Ends the training when all steps are traced."""


def trace(run: Run, path: Path, stage: str | None = None) -> Trace:
    """Trace the training steps of a stage on one device, or forward passes if no stage trains.

    The training is that of `qatkit run`, in a temporary folder. Weights that earlier stages would have trained are
    those of the recipe's model, because times do not depend on them.

    Args:
        run: The recipe; its folder is neither read nor written.
        path: Where the trace for Chrome and Perfetto is written; the name ends with .json or .json.gz.
        stage: The stage. The default is the last one that trains.

    Raises:
        QatkitError: the stage does not train or reads a cached teacher, or the training fails.
    """
    check_accelerator(run.recipe.trainer.accelerator)
    stages = run.recipe.stages
    trained = [name for name, each in stages.items() if each.max_steps]
    if stage is not None and stage not in trained:
        what = "does not train" if stage in stages else "is not a stage"
        raise QatkitError(f"'{stage}' {what}", key="--stage", advice=did_you_mean(stage, trained))
    if not trained:
        return _forward(run, path)
    return _training(run, stage or trained[-1], path)


def _training(run: Run, name: str, path: Path) -> Trace:
    trainer = replace(run.recipe.trainer, devices=1, strategy="auto")
    recipe = replace(run.recipe, trainer=trainer)
    stage = recipe.stages[name]
    if stage.max_steps < WARM + TRACED or stage.early_stopping is not None:
        raise QatkitError(
            f"a trace needs {WARM + TRACED} steps that nothing stops", key=f"stages.{name}",
            advice=f"use at least max_steps={WARM + TRACED}, and early_stopping=null",
        )  # fmt: skip
    block = stage.distill
    if block is not None and block.cache is not None:
        raise QatkitError(
            "a trace does not read cached teacher outputs", key=f"stages.{name}.distill.cache",
            advice=f"trace with the live teacher: stages.{name}.distill.cache=null",
        )  # fmt: skip
    spec, model = None, _untrained(run, name)
    if block is not None:
        resolved, models = resolved_block(run, name), run.stage_models()
        teacher = blocks.distill.teacher(resolved, _untrained(run, recipe.teacher_of(name)))
        data = run.build_data(stage.batch_size)
        spec = TeacherSpec(resolved, teacher, vocabulary(models[name], models.teacher(name), data, name))
    traced = _TraceSteps()
    with tempfile.TemporaryDirectory() as folder, traced.profiled, suppress(_Traced):
        train(recipe, name, model, spec, run.build_data, Path(folder), [], extra=[traced])
    return traced.profiled.result("training step", name, device_type(trainer.accelerator), path)


def _untrained(run: Run, stage: str | None) -> nn.Module:
    """The model that a stage trains, with the weights of its factory."""
    if stage is None:
        return run.build_model()
    recipe = run.recipe

    def built(factory: FactoryConfig, key: str) -> nn.Module:
        return run.build_model(Architecture(factory))

    model = starting_model(recipe, stage, built, lambda parent: _untrained(run, parent))
    if recipe.stages[stage].shrink is None:
        return model
    own = recipe.stages[stage].model
    start = architecture_of(model, Architecture(own or recipe.model), run.allow)
    return run.build_model(architecture_of(run.stage_models()[stage], start, run.allow))


def _forward(run: Run, path: Path) -> Trace:
    kind = device_type(run.recipe.trainer.accelerator)
    size = next(iter(run.recipe.stages.values())).batch_size
    data = run.build_data(size)
    data.prepare_data()
    data.setup("fit")
    (batch,) = first_batches(data.train_dataloader(), 1)
    model = run.build_model().eval().to(kind)
    batch = data.transfer_batch_to_device(batch, torch.device(kind), 0)
    profiled = _Profiled()
    with torch.no_grad(), profiled:
        for index in range(WARM + TRACED):
            if index == WARM:
                profiled.start(model)
            call(model, batch)
        profiled.stop()
    return profiled.result("forward pass", None, kind, path)


class _TraceSteps(Callback):
    def __init__(self) -> None:
        self.profiled = _Profiled()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == WARM and not self.profiled.started:
            self.profiled.start(pl_module)
        elif trainer.global_step == WARM + TRACED:
            self.profiled.stop()
            raise _Traced


def _marked(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with record_function(_RANGE):
            return function(*args, **kwargs)

    return called


class _Profiled:
    """A torch.profiler that marks the calls of fake quantizers, and has ended when its context ends."""

    def __init__(self) -> None:
        self.started = 0.0
        self.running = False
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profile = profile(activities=kinds)
        self._marked: list[FakeQuantize] = []
        self._functions = {name: getattr(linear, name) for name in ("fake_quantized", "fake_quantize_gradients")}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.stop()

    def start(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FakeQuantize):
                for name in _METHODS:
                    setattr(module, name, _marked(getattr(module, name)))  # until the end
                self._marked.append(module)
        for name, function in self._functions.items():
            setattr(linear, name, _marked(function))
        self._profile.start()
        self.running = True
        self.started = time.perf_counter()

    def stop(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds = time.perf_counter() - self.started
        self._profile.stop()
        self.running = False
        for module in self._marked:
            for name in _METHODS:
                delattr(module, name)
        for name, function in self._functions.items():
            setattr(linear, name, function)

    def result(self, what: str, stage: str | None, kind: str, path: Path) -> Trace:
        self._profile.export_chrome_trace(str(path))
        part = "device" if kind == "cuda" else "cpu"
        names = (f"self_{part}_time_total", f"{part}_time_total")
        rows = [
            (row.key, row.count / TRACED, *(getattr(row, name) / 1e6 / TRACED for name in names))
            for row in self._profile.key_averages()
        ]
        operators = sorted(
            (Operator(name, count, own) for name, count, own, _ in rows if own and name != _RANGE),
            key=lambda operator: -operator.seconds,
        )
        fake = sum(whole for name, _, _, whole in rows if name == _RANGE or name in _BACKWARD)
        busy = sum(own for _, _, own, _ in rows)
        return Trace(what, stage, kind, TRACED, self._seconds / TRACED, busy, fake, operators)
