"""A run that is killed between a stage's last step and its record ends with the same stage as an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qatkit import QatkitWarning
from qatkit.pipeline import finishing
from qatkit.pipeline.runner import run_stages
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.support.matrix import representatives

RECIPE = """
name: killed
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [32, 32], num_classes: 10}}
data: {factory: "tests.pipeline.test_early_stopping:few"}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 20, batch_size: 8, lr: 1.0e-2, schedule: constant}
  tried: {max_steps: 20, batch_size: 8, lr: 1.0e-2, schedule: constant, BLOCK}
  after: {max_steps: 10, batch_size: 8}
"""
BLOCKS = {
    "pruning": "prune: {sparsity: 0.7}",
    "pruning along a ramp": "prune: {ramp: {final: 0.8}}",
    "N:M with SR-STE": "prune: {method: srste, nm: [2, 4]}",
    "quantization": "quantize: {weight: {num_bits: 4, observer: lsq}, activation: {num_bits: 8, strategy: tensor}}",
    "early stopping": "early_stopping: {patience: 5, min_delta: 0.3}",  # 20 steps do not stop it, and 10 are the best
    "LoRA": "lora: {rank: 2}",
}


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs in this process."""


def run_of(folder: Path, block: str) -> Run:
    folder.mkdir()
    (folder / "killed.yaml").write_text(RECIPE.replace("BLOCK", block))
    return Run(load_recipe(folder / "killed.yaml"), folder / "run", ["tests"])


@pytest.mark.parametrize("name", representatives(list(BLOCKS), {1, 4}))
def test_the_rerun_leaves_the_same_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = BLOCKS[name]
    whole, killed = run_of(tmp_path / "whole", block), run_of(tmp_path / "killed", block)
    run_stages(whole)

    def die(folder: Path, *_: Any) -> None:
        if folder.name == "tried":
            raise Killed
        saved(folder, *_)

    saved = finishing.save_stage
    with monkeypatch.context() as patch:
        patch.setattr(finishing, "save_stage", die)
        with pytest.raises(Killed):
            run_stages(killed)
    checkpoint = torch.load(killed.folder("tried") / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 20, "no step is left"
    assert run_stages(killed) == ["tried", "after"]
    for stage in ("tried", "after"):
        one, two = whole.record(stage), killed.record(stage)
        assert (one.zeros, one.folds, one.early_stopping) == (two.zeros, two.folds, two.early_stopping)
        assert one.metrics == two.metrics
        for path in whole.folder(stage).rglob("*.safetensors"):
            other = killed.out / path.relative_to(whole.out)
            expected, found = load_file(path), load_file(other)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[key], found[key]) for key in expected), path.name
    if "prune" in block:
        assert sum(killed.record("after").zeros.values()) > 0
    if "early" in block:
        assert killed.record("tried").early_stopping["best_step"] == 10


def test_a_damaged_checkpoint_costs_an_epoch_and_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, damaged = run_of(tmp_path / "whole", BLOCKS["pruning"]), run_of(tmp_path / "damaged", BLOCKS["pruning"])
    run_stages(whole)

    def die(folder: Path, *_: Any) -> None:
        if folder.name == "tried":
            raise Killed
        saved(folder, *_)

    saved = finishing.save_stage
    with monkeypatch.context() as patch:
        patch.setattr(finishing, "save_stage", die)
        with pytest.raises(Killed):
            run_stages(damaged)
    path = damaged.folder("tried") / "last.ckpt"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])
    with pytest.warns(QatkitWarning, match=r"last\.ckpt is corrupt; resuming from .*previous\.ckpt"):
        run_stages(damaged)
    one, two = (load_file(run.folder("after") / "model" / "model.safetensors") for run in (whole, damaged))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not list(damaged.folder("tried").glob("*.ckpt*"))


def test_the_rerun_deletes_the_checkpoints_of_a_stage_that_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path / "run", BLOCKS["quantization"])

    def die(folder: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(finishing, "delete_checkpoints", die)
        with pytest.raises(Killed):
            run_stages(run, until="dense")
    left = {"last.ckpt", "started.json"}
    assert left <= {path.name for path in run.folder("dense").iterdir()}
    assert run_stages(run, until="dense") == []
    assert not left & {path.name for path in run.folder("dense").iterdir()}
