"""A fit with FSDP2 that resumes from a checkpoint ends with the bits of one that was never stopped."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tests.support import warm

pytestmark = pytest.mark.medium

WORKER = Path(__file__).parent / "resuming_worker.py"


def test_quantized_weights_resume_although_calibration_has_gathered_them(tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    subprocess.run([warm.python(), str(WORKER), str(out)], check=True, cwd=tmp_path)
    found = torch.load(out, weights_only=True)
    whole, half, resumed = (found[name] for name in ("whole", "half", "resumed"))
    assert (half["steps"], resumed["steps"]) == (8, 16)
    assert not torch.equal(half["state"]["0.weight"], whole["state"]["0.weight"])
    assert resumed["state"].keys() == whole["state"].keys()
    for key, value in whole["state"].items():
        assert torch.equal(value, resumed["state"][key]), key
