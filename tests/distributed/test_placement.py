"""Quantizers of results on two gloo processes against one process that accumulates over the same halves."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tests.support import warm

WORKER = Path(__file__).parent / "placement_worker.py"


def run(folder: Path, strategy: str, observer: str) -> subprocess.CompletedProcess[str]:
    command = [warm.python(), str(WORKER), strategy, observer, str(folder / f"{strategy}.pt")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "observer"), [("ddp", "lsq"), ("fsdp2", "minmax")])
def test_two_processes_give_the_weights_and_scales_of_one_bit_for_bit(
    strategy: str, observer: str, tmp_path: Path
) -> None:
    for each in ("single", strategy):
        run(tmp_path, each, observer).check_returncode()
    one, two = (torch.load(tmp_path / f"{each}.pt", weights_only=True) for each in ("single", strategy))
    assert one["points"] == two["points"]
    assert len(one["points"]) == 15
    assert one["state"].keys() == two["state"].keys()
    for key, value in one["state"].items():
        assert torch.equal(value, two["state"][key]), key


@pytest.mark.slow
def test_learned_scales_that_shards_would_share_are_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "fsdp2", "lsq")
    assert done.returncode != 0
    assert "activation.observer: 'lsq' is not supported with a target on ModelParallelStrategy" in done.stderr
