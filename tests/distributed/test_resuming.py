"""A fit with FSDP2 that resumes from a checkpoint ends with the bits of one that was never stopped."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import warm

pytestmark = pytest.mark.medium

WORKER = Path(__file__).parent / "resuming_worker.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("resuming") / "out.pt"
    subprocess.run([warm.python(), str(WORKER), str(out)], check=True, cwd=out.parent)
    results: dict[str, dict[str, Any]] = torch.load(out, weights_only=True)
    return results


def test_every_process_validates_with_the_running_statistics_that_a_checkpoint_holds(
    found: dict[str, dict[str, Any]],
) -> None:
    first, second = found["validated"]["first"], found["validated"]["second"]
    assert first.abs().max() > 0
    assert torch.equal(first, second)


def test_quantized_weights_resume_although_calibration_has_gathered_them(found: dict[str, dict[str, Any]]) -> None:
    whole, half, resumed = (found[name] for name in ("whole", "half", "resumed"))
    assert (half["steps"], resumed["steps"]) == (8, 16)
    assert not torch.equal(half["state"]["0.weight"], whole["state"]["0.weight"])
    assert resumed["state"].keys() == whole["state"].keys()
    for key, value in whole["state"].items():
        assert torch.equal(value, resumed["state"][key]), key
