"""On-policy distillation on two processes, replicated and sharded: no process waits for a finished text."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import warm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent


def test_two_processes_take_turns_together_and_write_texts_of_their_own(tmp_path: Path) -> None:
    worker = Path(__file__).parent / "generation_worker.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [warm.python(), str(worker), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    found: dict[str, Any] = torch.load(tmp_path / "out.pt", weights_only=True)
    for mode in ("ddp", "fsdp2"):
        first, second = found[mode]["seen"]
        written = [[bool((labels == -100).any()) for labels in seen] for seen in (first, second)]
        assert written[0] == written[1]
        assert 2 <= sum(written[0]) <= 6
        pairs = [(a, b) for a, b in zip(first, second, strict=True) if (a == -100).any()]
        assert any(a.shape != b.shape for a, b in pairs), "texts of one length would wait for nobody"
        assert all(value.isfinite().all() for value in found[mode]["state"].values())
    for key, value in found["ddp"]["state"].items():  # the same texts and gradients, however the weights are shared out
        torch.testing.assert_close(found["fsdp2"]["state"][key], value, rtol=1e-2, atol=2e-4)
