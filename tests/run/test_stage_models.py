"""The model of each stage without values has the names and shapes of the one that is trained."""

from __future__ import annotations

from pathlib import Path

import torch

from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from qatkit.run.stage_models import StageModels

RECIPE = """
name: walked
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [32], num_classes: 10}}
data: {factory: "qatkit.data:digits"}
stages:
  teacher: {max_steps: 0}
  student:
    max_steps: 0
    model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [8], num_classes: 10}}
    distill: {}
  after: {max_steps: 0, distill: {teacher: teacher}}
  branch: {max_steps: 0, start: teacher}
"""


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_each_stage_starts_with_its_own_model_or_its_parents(tmp_path: Path) -> None:
    (tmp_path / "walked.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "walked.yaml")
    models = StageModels(recipe)
    first = {stage: next(iter(shapes(models[stage]).values()))[0] for stage in recipe.stages}
    assert first == {"teacher": 32, "student": 8, "after": 8, "branch": 32}
    assert all(tensor.is_meta for stage in recipe.stages for tensor in models[stage].state_dict().values())
    assert models.teacher("student") is models["teacher"] is models[None]
    run = Run(recipe, tmp_path / "run")
    assert shapes(run.start_model("student")) == shapes(models["student"])
    assert shapes(run.start_model("teacher")) == shapes(run.stage_models()["teacher"])
