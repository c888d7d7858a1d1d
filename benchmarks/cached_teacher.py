"""Compare a teacher cached on disk with a live one: cost of a training step, and loss of the student.

Run: python benchmarks/cached_teacher.py [--quick]
Takes about ten minutes on two cores; --quick tests the mechanics in seconds and writes no results.

Text: Python's standard library. The teacher is the Llama of 4 layers that `qat_recovery.py` trains on it. The students
are 3 of its layers, and 2 layers with random weights. Every variant trains the same student on the same windows in the
same order, once per seed. Variants alternate in one process on one thread. A step is measured from the end of one
step to the end of the next, including data, in CPU time, which other processes disturb less than wall time. Results
are medians over all steps except the first of a fit.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import recovery
import torch
from harness import Claim, finish
from lightning.pytorch import Callback, Trainer
from qatkit.callbacks import KnowledgeDistillation
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from qatkit.data import stdlib_text
from qatkit.distillation.cache import CachedTeacher, cache_teacher
from qatkit.distillation.students import student_from_teacher
from qatkit.pipeline.module import CompressionModule
from qatkit.recipe import StageConfig
from qatkit.tasks import call, evaluate

VARIANTS = {"without": "no teacher", "live": "live teacher", "cached": "cached teacher, k = 64"}
ALPHA, K = 0.5, 64


@dataclass(frozen=True)
class Size:
    """Sizes of the full benchmark and of the quick mode."""

    text: recovery.Size
    base: Path | None
    """Where the teacher is; None trains one."""
    layers: tuple[int, int]
    """Of the student that starts as part of the teacher, and of the one with random weights."""
    steps: int
    held_out: int
    """Windows of the held-out loss."""
    seeds: tuple[int, ...]


FULL = Size(recovery.FULL, recovery.BASE, layers=(3, 2), steps=100, held_out=400, seeds=(0, 1, 2))
QUICK = Size(recovery.QUICK, None, layers=(1, 1), steps=5, held_out=16, seeds=(0,))


class Times(Callback):
    """CPU seconds of every step except the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.process_time()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def fit(net: nn.Module, rows: Any, size: Size, seed: int, *callbacks: Callback) -> list[float]:
    """Train, and return the seconds of each step."""
    times = Times()
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(rows, size.text.batch, shuffle=True, generator=order, drop_last=True)
    trainer = Trainer(
        accelerator="cpu", max_steps=size.steps, gradient_clip_val=1.0, callbacks=[*callbacks, times], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(CompressionModule(net, StageConfig(max_steps=size.steps, lr=1e-3, warmup=0.05), seed), loader)
    return times.seconds


def students_of(teacher: nn.Module, size: Size) -> dict[str, Callable[[int], nn.Module]]:
    """Functions that build each student from a seed."""
    part, random = size.layers

    def fresh(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return type(teacher)(student_from_teacher(teacher, random).config)

    return {
        f"{part} of the teacher's layers": lambda _: student_from_teacher(teacher, part),
        f"{random} layers, random weights": fresh,
    }


def main(size: Size) -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    data = stdlib_text(recovery.CONTEXT, recovery.VOCABULARY)
    data.prepare_data()
    with tempfile.TemporaryDirectory() as folder:
        teacher = recovery.base_model(size.text, size.base or Path(folder) / "base.safetensors")
    rows = Subset(data.train, range(size.steps * size.text.batch))
    held_out = Subset(data.val, range(size.held_out))
    students = students_of(teacher, size)
    runs = [(student, variant) for student in students for variant in VARIANTS]
    seconds: dict[tuple[str, str], list[float]] = {run: [] for run in runs}
    losses: dict[tuple[str, str], list[float]] = {run: [] for run in runs}
    with tempfile.TemporaryDirectory() as folder:

        def answer(batch: Any) -> Tensor:
            return call(teacher, batch)

        started = time.process_time()
        cache_teacher(answer, DataLoader(rows, size.text.batch), Path(folder), {}, K)
        written = time.process_time() - started
        cached = CachedTeacher(Path(folder), {})
        bytes_per_token = sum(path.stat().st_size for path in Path(folder).glob("*.arrow")) / cached.tokens
        teachers: dict[str, Any] = {"live": teacher, "cached": cached}
        for seed in size.seeds:
            for student, variant in runs:
                net = students[student](seed)
                distil = [
                    KnowledgeDistillation(teachers[name], alpha=ALPHA, student="model", fused=True)
                    for name in teachers
                    if name == variant
                ]
                seconds[student, variant] += fit(net, rows, size, seed, *distil)
                losses[student, variant].append(evaluate(net.eval(), DataLoader(held_out, size.text.batch))["loss"])
                print(
                    f"seed {seed}, {student}, {VARIANTS[variant]}: {losses[student, variant][-1]:.4f}", file=sys.stderr
                )
    table, apart, slower = [], {}, 0.0
    for student in students:
        without, live, cached_step = (median(seconds[student, variant]) for variant in VARIANTS)
        for variant, step in zip(VARIANTS, (without, live, cached_step), strict=True):
            found = losses[student, variant]
            table.append(
                {
                    "student": student,
                    "variant": VARIANTS[variant],
                    "held-out loss": f"{mean(found):.3f} ± {stdev(found) if len(found) > 1 else 0.0:.3f}",
                    "step, ms": f"{step * 1000:.0f}",
                    "relative to no teacher": f"{step / without:.2f}x",
                    "relative to live teacher": f"{step / live:.2f}x",
                }
            )
        # of the seed where they differ most: over seeds, differences of both signs would cancel
        pairs = zip(losses[student, "cached"], losses[student, "live"], strict=True)
        apart[student] = max(abs(mine / theirs - 1) for mine, theirs in pairs)
        slower = max(slower, cached_step / without)
    claims = [
        *(
            Claim(
                f"{name}: loss with the cache, difference from live, worst seed", "within 2%", f"{far:.2%}", far <= 0.02
            )
            for name, far in apart.items()
        ),
        Claim("step time with the cache relative to no teacher", "<= 1.15x", f"{slower:.2f}x", slower <= 1.15),
        Claim("bytes per token, k = 64", "<= 350", f"{bytes_per_token:.0f}", bytes_per_token <= 350),
    ]
    print(f"writing the cache: {written:.1f} s for {cached.tokens:,} tokens")
    if size is QUICK:
        for row in table:
            print(" | ".join(row.values()))
        return
    finish("cached_teacher", table, claims, size.seeds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    main(QUICK if parser.parse_args().quick else FULL)
