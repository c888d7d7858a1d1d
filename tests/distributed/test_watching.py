"""A NaN on one process, early stopping and samples on two: both processes skip the same step and end alike."""

from __future__ import annotations

import os
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import warm

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parent / "watching_worker.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("watching") / "out.pt"
    environment = os.environ | {"PYTHONPATH": str(WORKER.parent.parent.parent)}
    command = [warm.python(), str(WORKER), str(out)]
    subprocess.run(command, check=True, cwd=out.parent, env=environment)
    found: dict[str, dict[str, Any]] = torch.load(out, weights_only=True)
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_step_that_is_nan_on_one_process_is_left_out_on_all(
    results: dict[str, dict[str, Any]], strategy: str
) -> None:
    states = results[strategy]["states"]
    assert [same(before, after) for before, after in pairwise(states)] == [True, False, False]
    assert all(value.isfinite().all() for state in states for value in state.values())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_best_model_comes_back_on_all_processes(results: dict[str, dict[str, Any]], strategy: str) -> None:
    found = results[strategy]
    assert found["record"] == {"stopped": True, "steps": 4, "best_step": 3, "val/loss": 1.0}
    assert same(found["end"], found["states"][2])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_samples_are_written_once(results: dict[str, dict[str, Any]], strategy: str) -> None:
    assert [row["step"] for row in results[strategy]["samples"]] == [2, 2, 4, 4]
    assert results[strategy]["samples"] == results["ddp"]["samples"]
