"""A task that only a row of the table knows: validation, a run, verification and the report take it from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qatkit import QatkitError
from qatkit.data import SplitDataModule, digits
from qatkit.pipeline.export import export_run
from qatkit.pipeline.report import report_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.validation import validate_recipe
from qatkit.pipeline.verify import verify_run
from qatkit.recipe.loading import load_recipe
from qatkit.report.page import write_page
from qatkit.run.folder import Run
from qatkit.tasks.table import TASKS, Task

PARITY = Task(
    name="parity",
    description="whether a digit is odd",
    answers="tests.tasks.test_new_task:answers",
    metrics=("loss", "accuracy"),
    metric="accuracy",
    agreement="parity",
    counted="test numbers",
)

RECIPE = """
name: parity
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [16], num_classes: 2}}
data: {factory: "tests.tasks.test_new_task:numbers"}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 60, lr: 1.0e-2, batch_size: 64}
export: {format: dense}
"""


def answers(logits: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    return logits, batch[1] % 2


def numbers(batch_size: int, seed: int) -> SplitDataModule:
    data = digits(batch_size=batch_size, seed=seed)
    data.task = "parity"
    return data


numbers.task = "parity"  # type: ignore[attr-defined]  # as a user declares it


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(TASKS, "_rows", {**TASKS._rows, "parity": PARITY})
    (tmp_path / "parity.yaml").write_text(RECIPE)
    return Run(load_recipe(tmp_path / "parity.yaml"), tmp_path / "run", ["tests"])


def test_a_row_of_the_table_is_all_that_a_new_task_takes(run: Run, tmp_path: Path) -> None:
    assert validate_recipe(run.recipe, ["tests"]) == {}
    run_stages(run)
    metrics = run.record("dense").metrics
    assert metrics["test/accuracy"] > 0.8  # of two classes; digits of ten would not even fit the model
    assert 0 < metrics["val/loss"] < 0.5
    export_run(run)
    checked = verify_run(run)["dense"]
    assert (checked.task, checked.metric) == ("parity", "accuracy")
    assert "test numbers, outputs differ" in checked.summary()
    report_run(run)
    write_page([run.out], tmp_path / "page.html")
    assert "Both models predict the same parity for all 360 test numbers." in (tmp_path / "page.html").read_text()


def test_capabilities_of_the_row_are_asked_before_training(run: Run, tmp_path: Path) -> None:
    recipe = load_recipe(tmp_path / "parity.yaml", ["evaluate={}"])
    message = r"^evaluate: .*only for next-token prediction, but the task is parity \(whether a digit"
    with pytest.raises(QatkitError, match=message):
        validate_recipe(recipe, ["tests"])


def test_a_task_that_no_row_knows_is_an_error_before_training(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(numbers, "task", "parities")
    message = r"^data\.factory: unknown task 'parities'; did you mean 'parity'\?$"
    with pytest.raises(QatkitError, match=message):
        validate_recipe(run.recipe, ["tests"])
    with pytest.raises(QatkitError, match=r"^batch\.task: unknown task 'paritie'"):
        TASKS.row("paritie", "batch.task")


def test_data_that_declare_nothing_are_classified_by_the_documented_default(tmp_path: Path) -> None:
    from qatkit.tasks import task_of

    assert task_of((torch.zeros(2, 3), torch.zeros(2))).name == "classification"
    assert task_of({"input_ids": torch.zeros(2, 3), "labels": torch.zeros(2, 3)}).name == "causal"
    assert task_of({"input_ids": torch.zeros(2, 3), "labels": torch.zeros(2)}).name == "text_classification"
    assert task_of((torch.zeros(2, 3), torch.zeros(2)), PARITY) is PARITY
