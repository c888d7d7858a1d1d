"""A recipe that shrinks on two processes removes what one process removes, and the smaller model trains."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support import warm

pytestmark = pytest.mark.slow

IMAGES = """
name: shrink
model: {factory: "qatkit.models:cnn", args: {channels: [8, 16]}}
data: {factory: "qatkit.data:digits"}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 0}
  cut: {max_steps: 0, shrink: {channels: 0.5, calibration_batches: 3}}
  recover: {max_steps: 3, lr: 1.0e-2, distill: {alpha: 0.5}}
"""
TEXT = """
name: shrink
model:
  factory: "qatkit.models:llama"
  args: {vocab_size: 300, hidden: 32, layers: 3, heads: 4, kv_heads: 2, intermediate: 64, context: 16}
data:
  factory: "qatkit.data:stdlib_text"
  args: {vocab_size: 300, context: 16, include: ['email/*'], val_fraction: 0.2, test_fraction: 0.1, epoch_batches: 10}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 0}
  cut: {max_steps: 0, shrink: {layers: 2, heads: 0.5, neurons: 0.5, hidden: 24, calibration_batches: 3}}
  recover: {max_steps: 3, lr: 1.0e-2, distill: {alpha: 0.5}}
"""


def run(folder: Path, *overrides: str) -> None:
    command = [warm.qatkit(), "run", "shrink.yaml", "--out", "run", "--quiet", *overrides]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def weights(folder: Path, stage: str) -> dict[str, Tensor]:
    return load_file(folder / "run" / "stages" / stage / "model" / "model.safetensors")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    "recipe",
    [pytest.param(IMAGES, id="channels"), pytest.param(TEXT, id="transformer", marks=pytest.mark.slow)],
)
def test_two_processes_cut_what_one_cuts_also_where_they_start_there_and_train_it(
    recipe: str, strategy: str, tmp_path: Path
) -> None:
    if recipe == IMAGES:
        pytest.importorskip("torch_pruning")
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "shrink.yaml").write_text(recipe)
    run(one)
    run(two, "trainer.devices=2", f"trainer.strategy={strategy}")
    for again in (False, True):
        if again:  # the processes meet only when this stage trains
            for stage in ("cut", "recover"):
                shutil.rmtree(two / "run" / "stages" / stage)
            run(two, "trainer.devices=2", f"trainer.strategy={strategy}")
        expected, found = weights(one, "cut"), weights(two, "cut")
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.equal(value, found[key]), key
        trained = weights(two, "recover")
        assert all(value.isfinite().all() for value in trained.values() if value.is_floating_point())
        assert any(not torch.equal(value, trained[key]) for key, value in found.items())
