"""Starting points on two gloo processes: every process has the same weights, whatever batches it saw."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tests.support import warm

ROOT = Path(__file__).parent.parent.parent


def start(mode: str, out: Path) -> subprocess.CompletedProcess[str]:
    command = [warm.python(), "-m", "tests.distributed.init_worker", mode, str(out)]
    return subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)


def test_gptq_leaves_the_same_weights_and_scales_on_both_processes(tmp_path: Path) -> None:
    result = start("ddp", tmp_path / "out.pt")
    assert result.returncode == 0, result.stderr
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    first, second = content["ranks"]
    assert content["changed"]
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)


def test_sharded_weights_are_refused_with_what_to_do(tmp_path: Path) -> None:
    result = start("fsdp2", tmp_path / "out.pt")
    assert result.returncode != 0
    assert (
        "init: 'gptq' requires unsharded weights, but FSDP2 shards them; run gptq in a separate stage" in result.stderr
    )


@pytest.mark.parametrize("mode", ["diverged", "diverged pruning"])
def test_bad_batches_on_one_process_stop_both(mode: str, tmp_path: Path) -> None:
    result = start(mode, tmp_path / "out.pt")
    assert result.returncode != 0
    assert "(on rank 1)" in result.stderr
    assert "layer 'model.1'" in result.stderr
