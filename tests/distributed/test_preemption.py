"""SIGTERM at either of two processes ends both with a checkpoint; the rerun has the bits of an uninterrupted run."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.support.preempted import run, same, weights

AGAIN = "run the same command again to resume stage 'dense' from the last checkpoint"


def said(stderr: str) -> list[str]:
    return [
        line for line in stderr.splitlines() if not line.startswith(("Initializing distributed", "[W", "Exception"))
    ]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_both_processes_end_whichever_is_stopped_and_wherever_they_are(strategy: str, tmp_path: Path) -> None:
    two = ["trainer.devices=2", f"trainer.strategy={strategy}", "stages.dense.max_steps=12"]  # epochs of five steps
    assert run(tmp_path, *two, out="whole").returncode == 0
    stops = [
        ("train:2", "1", f"a checkpoint was saved at step 2; {AGAIN}"),
        ("train:2", "0", f"a checkpoint was saved at step 4; {AGAIN}"),
        ("validation:1", "1", f"an epoch ended at step 5; {AGAIN}"),
        ("hold", "1", AGAIN),  # it waits for the first process, which evaluates the trained stage
    ]
    for place, rank, message in stops:
        done = run(tmp_path, *two, STOP_AT=place, STOP_RANK=rank)
        assert done.returncode == 143, (place, rank)
        assert said(done.stderr) == [f"terminated by SIGTERM: {message}"], (place, rank)
        for name in ("pid0", "pid1"):
            while os.path.exists(f"/proc/{(tmp_path / name).read_text()}"):  # the test hangs if a process does
                time.sleep(0.01)
    assert run(tmp_path, *two).returncode == 0
    assert same(weights(tmp_path), weights(tmp_path, "whole"))
