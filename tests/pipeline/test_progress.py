"""A log that is no terminal gets a line of progress every half minute."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qatkit.pipeline.progress import ProgressLines


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def steps(lines: ProgressLines, clock: Clock, first: int, last: int, seconds: float, rank: int = 0) -> None:
    """Train steps of the same length."""
    trainer: Any = SimpleNamespace(
        global_step=first,
        max_steps=600,
        is_global_zero=rank == 0,
        callback_metrics={"train/loss": torch.tensor(0.1234)},
    )
    lines.on_train_start(trainer, None)  # type: ignore[arg-type]
    for step in range(first + 1, last + 1):
        clock.now += seconds
        trainer.global_step = step
        lines.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]


def test_a_line_has_the_step_the_loss_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    steps(ProgressLines("stage qat (3 of 3)"), clock, 0, 130, 0.5)
    assert capsys.readouterr().out.splitlines() == [
        "stage qat (3 of 3): step 60 of 600, train/loss 0.1234, 4 min 30 s left",
        "stage qat (3 of 3): step 120 of 600, train/loss 0.1234, 4 min 0 s left",
    ]


def test_the_time_left_of_a_resumed_stage_counts_from_its_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    steps(ProgressLines("stage qat (3 of 3)"), clock, 540, 571, 1.0)
    assert capsys.readouterr().out == "stage qat (3 of 3): step 570 of 600, train/loss 0.1234, 30 s left\n"


def test_only_the_first_process_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    steps(ProgressLines("stage qat (3 of 3)"), clock, 0, 130, 0.5, rank=1)
    assert capsys.readouterr().out == ""
