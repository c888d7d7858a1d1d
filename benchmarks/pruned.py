"""Parts of `prune_accuracy.py`: a digits CNN and a small Llama, pruned with each of qatkit's callbacks."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import recovery
import torch
from lightning.pytorch import Callback, Trainer
from qatkit.callbacks import ConstantPruning, KnowledgeDistillation, MagnitudePruning
from torch import nn
from torch.utils.data import DataLoader

from qatkit import Ramp
from qatkit.data import digits, text_windows
from qatkit.models import cnn
from qatkit.pipeline.module import CompressionModule
from qatkit.pipeline.runner import run_stages
from qatkit.pruning.layers import prunable_layers
from qatkit.pruning.masks import apply_mask, global_masks, nm_mask
from qatkit.pruning.one_shot import prune_one_shot
from qatkit.recipe import StageConfig
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from qatkit.tasks import evaluate

ROUNDS = {0.8: 7, 0.9: 10}
"""Rounds of the lottery to reach each sparsity when every round prunes `FRACTION` of the remaining weights."""
FRACTION = 1 - 0.2 ** (1 / 7)


@dataclass(frozen=True)
class Size:
    """Sizes of the full benchmark and of the quick mode."""

    digits_steps: int
    text: recovery.Size
    channels: tuple[int, ...] = (16, 32, 32)
    rounds: tuple[tuple[float, int], ...] = tuple(ROUNDS.items())


FULL = Size(1000, replace(recovery.FULL, steps=200))
QUICK = Size(12, recovery.QUICK, (4, 4), ((0.8, 1), (0.9, 2)))


@dataclass(frozen=True)
class Job:
    """One model: task, method, sparsity, and the seed of the data order (and of the first weights of the CNN)."""

    task: str
    """digits or text."""
    method: str
    """dense, dense trained further, one-shot, gradual, 2:4 by magnitude, wanda or sparsegpt, lottery; of a 2:4 start ",
    trained"; with "+ KD" from the dense model."""
    sparsity: float = 0.0
    seed: int = 0

    @property
    def seeded(self) -> bool:
        """Whether the seed matters: each CNN is trained from its own weights, and there is one Llama."""
        return self.task == "digits" or "trained" in self.method or "gradual" in self.method


def do(job: Job, size: Size, folder: Path, base: Path) -> dict[str, float]:
    """Run a job and return its measured values by name.

    Args:
        job: The job.
        size: Full or quick.
        folder: Folder of the dense CNNs, created if missing.
        base: Path of the dense Llama, created if missing.
    """
    torch.set_num_threads(1)  # one job per core
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    if job.method == "lottery":
        return _lottery(job, size)
    return _digits(job, size, folder) if job.task == "digits" else _text(job, size, base)


def _digits(job: Job, size: Size, folder: Path) -> dict[str, float]:
    data = digits(seed=job.seed)
    stage = StageConfig(max_steps=size.digits_steps, lr=3e-3)
    path = folder / f"digits_{size.digits_steps}_{job.seed}.pt"
    torch.manual_seed(job.seed)
    model = cnn(size.channels)
    if path.exists():
        model.load_state_dict(torch.load(path))
    else:
        _fit(model, stage, data.train_dataloader(), job.seed)
        temporary = path.with_suffix(f".{os.getpid()}")  # another job may train the same model meanwhile
        torch.save(model.state_dict(), temporary)
        temporary.rename(path)
    if job.method != "dense":
        teacher = copy.deepcopy(model) if job.method.endswith("+ KD") else None
        how = _callbacks(job, model, [], "model")
        if how is not None:
            _fit(model, stage, data.train_dataloader(), job.seed, how, teacher, 4.0, 0.7)
    return {"accuracy": evaluate(model.eval(), data.test_dataloader())["accuracy"], "zeros": _zeros(model, [])}


def _text(job: Job, size: Size, base: Path) -> dict[str, float]:
    model = recovery.base_model(size.text, base)
    if job.method != "dense":
        teacher = copy.deepcopy(model) if job.method.endswith("+ KD") else None
        batches = list(recovery.calibration_batches(size.text))
        how = _callbacks(job, model, ["lm_head"], "layer", batches)
        if how is not None:
            stage = StageConfig(
                max_steps=size.text.steps, batch_size=size.text.batch, lr=1e-3, warmup=0.05, gradient_clip=1.0
            )
            _fit(model, stage, _windows(size.text, job.seed), job.seed, how, teacher, 1.0, 0.5)
    return {"loss": recovery.evaluate(model.eval(), size.text), "zeros": _zeros(model, ["lm_head"])}


def _callbacks(
    job: Job, model: nn.Module, exclude: Sequence[str], scope: Any, batches: list[Any] | None = None
) -> list[Callback] | None:
    """Prune now if the method is one-shot; then return the callbacks for training, or None without training."""
    method = job.method.removesuffix(" + KD")
    layers = prunable_layers(model, exclude=exclude)
    weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
    inside = [f"model.{name}" for name in exclude]
    if method == "dense trained further":
        return []
    if method == "gradual":
        return [MagnitudePruning(ramp=Ramp(job.sparsity, end=0.5), scope=scope, exclude=inside)]
    if method == "one-shot":
        masks = global_masks(weights, job.sparsity) if scope == "model" else {
            name: global_masks({name: weight}, job.sparsity)[name] for name, weight in weights.items()
        }  # fmt: skip
        for name, mask in masks.items():
            apply_mask(weights[name], mask)
        return None
    start = method.removeprefix("2:4 ").removesuffix(", trained")
    if start == "magnitude":
        for weight in weights.values():
            apply_mask(weight, nm_mask(weight, 2, 4))
    else:
        assert start in ("wanda", "sparsegpt")
        assert batches is not None
        prune_one_shot(model, batches, start, nm=(2, 4), exclude=exclude)
    return [ConstantPruning(exclude=inside)] if method.endswith(", trained") else None


def _fit(
    model: nn.Module,
    stage: StageConfig,
    loader: DataLoader[Any],
    seed: int,
    callbacks: Sequence[Callback] = (),
    teacher: nn.Module | None = None,
    temperature: float = 1.0,
    alpha: float = 0.0,
) -> None:
    """Train as a stage of a recipe does."""
    distil = [KnowledgeDistillation(teacher, temperature, alpha, student="model")] if teacher is not None else []
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=stage.max_steps, max_epochs=-1, gradient_clip_val=stage.gradient_clip,
        callbacks=[*callbacks, *distil], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(CompressionModule(model.train(), stage, seed), loader)
    assert trainer.global_step == stage.max_steps


def _windows(size: recovery.Size, seed: int) -> DataLoader[Any]:
    """The text in the order of the seed, in batches for transformers."""
    windows = text_windows(recovery.CONTEXT, recovery.VOCABULARY)[0]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))

    def batch(rows: list[Any]) -> dict[str, Any]:
        tokens = torch.stack(rows)
        return {"input_ids": tokens, "labels": tokens}

    return DataLoader(windows[order], size.batch, drop_last=True, collate_fn=batch)  # type: ignore[arg-type]


def _zeros(model: nn.Module, exclude: Sequence[str]) -> float:
    """Fraction of zeros in the prunable weights."""
    weights: list[Any] = [layer.weight for layer in prunable_layers(model, exclude=exclude).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


LOTTERY = """
name: lottery
seed: {seed}
model: {{factory: "qatkit.models:cnn", args: {{channels: {channels}}}}}
data: {{factory: "qatkit.data:digits"}}
trainer: {{accelerator: cpu}}
stages:
  ticket:
    max_steps: {steps}
    lr: 3.0e-3
    lottery: {{rounds: {rounds}, fraction: {fraction}, rewind: {rewind}, scope: model, reinit: true}}
"""


def _lottery(job: Job, size: Size) -> dict[str, float]:
    """Tickets and their controls at every sparsity; a run of more rounds resumes one of fewer."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for sparsity, rounds in size.rounds:
            path = Path(folder) / "lottery.yaml"
            path.write_text(
                LOTTERY.format(
                    seed=job.seed, channels=list(size.channels), steps=size.digits_steps, rounds=rounds,
                    fraction=FRACTION, rewind=max(size.digits_steps // 20, 1),
                )
            )  # fmt: skip
            run = Run(load_recipe(path), Path(folder) / "run")
            run_stages(run, force=True)  # the control of fewer rounds is trained again
            for name, stage in (("ticket", f"ticket_{rounds}"), ("reinit", "ticket_reinit")):
                found[f"{name} {sparsity:.0%}"] = run.record(stage).metrics["test/accuracy"]
                found[f"zeros {sparsity:.0%}"] = _zeros(run.load_model(stage), [])
    return found
