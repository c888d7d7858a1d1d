"""A process killed during pruning resumes to the same weights and masks."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qatkit.pipeline.runner import run_stages
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.support.waiting import wait_for

RECIPE = """
name: killed
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [64, 32], num_classes: 10}}
data: {factory: "qatkit.data:digits"}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 30, lr: 3.0e-3}
  pruned: {max_steps: 300, prune: PRUNE}
export: {format: dense}
"""
COMMAND = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from tests.recipes.test_killed_pruning import run_of, run_stages
run_stages(run_of(Path(sys.argv[1]), sys.argv[2]))
"""


def run_of(folder: Path, prune: str) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "killed.yaml").write_text(RECIPE.replace("PRUNE", prune))
    return Run(load_recipe(str(folder / "killed.yaml")), folder / "run")


def kill_when_saved(folder: Path, prune: str, checkpoint: Path) -> int:
    """Start the run in a process of its own and kill it once the stage has a checkpoint; the checkpoint's step."""
    process = subprocess.Popen([sys.executable, "-c", COMMAND, str(folder), prune], stdout=subprocess.DEVNULL)
    wait_for(checkpoint, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return int(torch.load(checkpoint, weights_only=True)["global_step"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "prune",
    [
        pytest.param("{ramp: {final: 0.9}, scope: model}", id="magnitude along a ramp"),
        pytest.param("{method: movement, ramp: {final: 0.8, start: 0.1}}", id="movement"),
        pytest.param("{method: srste, nm: [2, 4]}", id="SR-STE"),
    ],
)
def test_a_stage_that_is_killed_ends_with_the_same_weights_and_masks(tmp_path: Path, prune: str) -> None:
    torch.set_num_threads(1)
    whole, killed = run_of(tmp_path / "whole", prune), run_of(tmp_path / "killed", prune)
    run_stages(whole)
    step = kill_when_saved(tmp_path / "killed", prune, killed.folder("pruned") / "last.ckpt")
    assert 0 < step < 300
    assert killed.find("pruned") is None, "the process was killed before the stage ended"
    assert run_stages(killed) == ["pruned"]
    one, two = (load_file(run.folder("pruned") / "model" / "model.safetensors") for run in (whole, killed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert whole.record("pruned").zeros == killed.record("pruned").zeros
    assert sum(whole.record("pruned").zeros.values()) > 0
