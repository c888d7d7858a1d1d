"""A weight that becomes NaN or infinite: the last good checkpoint stays, and no stage is finished with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qatkit import QatkitError
from qatkit.models import mlp
from qatkit.pipeline.finishing import save_result
from qatkit.pipeline.module import CompressionModule
from qatkit.pipeline.runner import run_stages
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from qatkit.run.record import StageRecord
from tests.pipeline.test_early_stopping import few

pytestmark = pytest.mark.filterwarnings("ignore:training.*skipped:qatkit.errors.QatkitWarning")

# ten steps of eight samples are an epoch
RECIPE = """
name: non_finite
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [16], num_classes: 10}}
data: {factory: "tests.pipeline.test_early_stopping:few"}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 60, lr: 1.0e-3, batch_size: 8}
"""


def run_of(folder: Path, *overrides: str) -> Run:
    (folder / "non_finite.yaml").write_text(RECIPE)
    return Run(load_recipe(folder / "non_finite.yaml", list(overrides)), folder / "run", ["tests"])


def set_infinite_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Make one weight infinite before a step, as an update does that goes too far."""
    plain = CompressionModule.training_step

    def training_step(self: CompressionModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == step:
            last = [layer for layer in self.model.modules() if isinstance(layer, nn.Linear)][-1]
            with torch.no_grad():
                last.weight[3, 4] = torch.inf
        return plain(self, batch, batch_idx)

    patch.setattr(CompressionModule, "training_step", training_step)


def test_the_checkpoint_before_a_non_finite_weight_stays_and_training_goes_on_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = run_of(tmp_path), tmp_path / "run" / "stages" / "dense" / "last.ckpt"
    with monkeypatch.context() as patch:
        set_infinite_at(patch, 34)
        with pytest.raises(QatkitError) as caught:
            run_stages(run)
    message = str(caught.value)
    assert "10 consecutive steps, up to step 44 ('weight' of layer 'model." in message
    assert str(path) in message
    kept = torch.load(path, weights_only=True)
    assert kept["global_step"] == 30
    assert all(value.isfinite().all() for value in kept["state_dict"].values())
    assert run_stages(run) == ["dense"]


def test_a_stage_that_ends_with_a_non_finite_weight_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, "stages.dense.max_steps=8")
    with monkeypatch.context() as patch:
        set_infinite_at(patch, 4)
        with pytest.raises(QatkitError, match=r"stages\.dense: 'weight' of layer '\d' was non-finite"):
            run_stages(run)
    folder = run.folder("dense")
    assert run.find("dense") is None
    assert not [name for name in ("model", "last.ckpt", "stage.json", "adapter") if (folder / name).exists()]
    assert run_stages(run) == ["dense"]


def test_a_model_that_becomes_non_finite_when_adapters_are_merged_is_not_written(tmp_path: Path) -> None:
    model = mlp(64, [16], 10)
    (tmp_path / "adapter").mkdir()
    nn.init.constant_(next(model.parameters()), torch.nan)
    with pytest.raises(QatkitError, match=r"stages\.lora: 'weight' of layer"):
        save_result(tmp_path, model, StageRecord("lora", "x", {}), few())
    assert not list(tmp_path.iterdir())
