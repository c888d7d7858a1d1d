"""Data without a validation or a test split: nothing is reported that was not measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qatkit import QatkitError
from qatkit.data import SplitDataModule, digits
from qatkit.pipeline.export import export_run
from qatkit.pipeline.report import report_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.verify import verify_run
from qatkit.recipe.loading import load_recipe
from qatkit.report.page import write_page
from qatkit.run.folder import Run

RECIPE = """
name: splits
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [8], num_classes: 10}}
data: {factory: "tests.pipeline.test_missing_splits:parts", args: {without: val}}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 3, batch_size: 64}
export: {format: dense}
"""


def parts(without: str, batch_size: int, seed: int) -> SplitDataModule:
    data: Any = digits(batch_size=batch_size, seed=seed)
    setattr(data, f"{without}_dataloader", lambda: [])
    return data  # type: ignore[no-any-return]  # the module of `digits`


def run_of(folder: Path, *overrides: str) -> Run:
    (folder / "splits.yaml").write_text(RECIPE)
    return Run(load_recipe(folder / "splits.yaml", list(overrides)), folder / "run", ["tests"])


def test_a_metric_of_a_split_without_data_is_left_out_and_not_zero(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run_stages(run)
    assert sorted(run.record("dense").metrics) == ["test/accuracy", "test/loss"]
    export_run(run)
    verify_run(run)
    report_run(run)
    write_page([run.out], tmp_path / "page.html")
    assert "no validation data" in (tmp_path / "page.html").read_text()


def test_a_stage_without_test_data_says_what_to_do(tmp_path: Path) -> None:
    run = run_of(tmp_path, "data.args.without=test")
    with pytest.raises(QatkitError, match=r"^data: the test data has no batches, so stage 'dense' cannot be measured"):
        run_stages(run)
    assert run.find("dense") is None
