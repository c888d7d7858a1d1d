"""A run that is killed and resumed logs the same numbers at the same steps as an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qatkit.pipeline import trainer
from qatkit.pipeline.runner import run_stages
from qatkit.recipe.loading import load_recipe
from qatkit.report.curves import read_curves
from qatkit.run.folder import Run

# epochs of 11 steps; the loss is logged every ten steps
RECIPE = """
name: logged
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [8], num_classes: 10}}
data: {factory: "tests.pipeline.test_early_stopping:few"}
trainer: {accelerator: cpu}
stages:
  only: {max_steps: 45, batch_size: 7}
"""


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs in this process."""


def run_of(folder: Path) -> Run:
    folder.mkdir()
    (folder / "logged.yaml").write_text(RECIPE)
    return Run(load_recipe(folder / "logged.yaml"), folder / "run", ["tests"])


@pytest.mark.parametrize("checkpoints", [1, 2])
def test_the_curves_of_a_killed_run_are_those_of_an_uninterrupted_one(
    checkpoints: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = run_of(tmp_path / "whole"), run_of(tmp_path / "killed")
    run_stages(whole)
    saved = 0

    def save_and_die(content: dict[str, Any], path: Path) -> None:
        nonlocal saved
        save(content, path)
        saved += 1
        if saved == checkpoints:
            raise Killed

    save = trainer.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            run_stages(killed)
    run_stages(killed)
    one, two = (read_curves(run.folder("only") / "logs") for run in (whole, killed))
    assert one["metrics"].keys() == {"train/loss", "val/loss", "val/accuracy"}
    assert two["metrics"] == one["metrics"]
    assert len(two["resumed_at"]) == 1
