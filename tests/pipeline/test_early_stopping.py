"""Early stopping of a stage: when it ends, what it leaves, what is written of it, and that a kill changes nothing."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from qatkit import QatkitError
from qatkit.pipeline.early_stopping import StopEarly
from qatkit.pipeline.module import CompressionModule
from qatkit.pipeline.runner import run_stages
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.support.recipes import assert_says, refusal

# 80 samples for 30,000 weights: by heart after a few epochs of ten steps
RECIPE = """
name: stopped
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [128, 128], num_classes: 10}}
data: {factory: "tests.pipeline.test_early_stopping:few"}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 400, lr: 1.0e-2, batch_size: 8, schedule: constant, early_stopping: {patience: 3}}
"""


def few(batch_size: int = 8, seed: int = 0, validated: bool = True) -> Any:
    """Fewer digits to learn from than there are to be learned."""
    from torch.utils.data import Subset

    from qatkit.data import digits

    data = digits(batch_size=batch_size, seed=seed)
    data.train = Subset(data.train, range(80))
    if not validated:
        data.val = Subset(data.val, [])
    return data


def run_of(folder: Path, *overrides: str, name: str = "run") -> Run:
    (folder / "stopped.yaml").write_text(RECIPE)
    return Run(load_recipe(folder / "stopped.yaml", list(overrides)), folder / name, ["tests"])


def losses(run: Run) -> dict[int, float]:
    """The validation losses of the last attempt by optimizer step."""
    logs = sorted((run.folder("dense") / "logs").glob("attempt_*/metrics.csv"))[-1]
    with logs.open(newline="") as file:
        return {int(row["step"]) + 1: float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")}


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.load_model("dense").state_dict()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = run_of(tmp_path_factory.mktemp("stopped"))
    run_stages(run)
    return run


def test_the_stage_ends_after_as_many_validations_without_an_improvement(done: Run) -> None:
    found = losses(done)
    best = min(found, key=lambda step: found[step])
    assert list(found) == list(range(10, best + 31, 10))
    assert best + 30 < 400
    assert done.record("dense").early_stopping == {
        "stopped": True, "steps": best + 30, "best_step": best, "val/loss": pytest.approx(found[best], rel=1e-4)
    }  # fmt: skip
    assert sorted(path.name for path in done.folder("dense").iterdir()) == ["logs", "model", "stage.json"]


@pytest.mark.parametrize("block", ["", "lora={rank: 4, bits: 4}", "quantize={weight: {num_bits: 4, observer: lsq}}"])
def test_its_result_is_the_model_of_the_best_validation(block: str, tmp_path: Path) -> None:
    options = [f"stages.dense.{block}"] if block else []
    run = run_of(tmp_path, *options)
    run_stages(run)
    record = run.record("dense").early_stopping
    assert record is not None
    steps = record["best_step"]
    assert steps < record["steps"]
    until_best = run_of(
        tmp_path, *options, f"stages.dense.max_steps={steps}", "stages.dense.early_stopping=null", name="best"
    )
    run_stages(until_best)
    expected, found = weights(until_best), weights(run)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_stage_that_goes_on_falling_is_not_stopped_and_says_so(tmp_path: Path) -> None:
    run = run_of(tmp_path, "stages.dense.max_steps=25")
    run_stages(run)
    record = run.record("dense").early_stopping
    assert record is not None
    assert (record["stopped"], record["steps"], record["best_step"]) == (False, 25, 20)


def test_an_improvement_has_to_be_larger_than_min_delta(tmp_path: Path) -> None:
    run = run_of(tmp_path, "stages.dense.early_stopping={patience: 1, min_delta: 100.0}")
    run_stages(run)
    record = run.record("dense").early_stopping
    assert record is not None
    assert (record["steps"], record["best_step"]) == (20, 10)


@pytest.mark.parametrize("where", ["in the middle", "after the last step"])
def test_a_run_that_was_killed_stops_where_it_would_have(
    where: str, done: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise RuntimeError("the machine is gone")

    def in_the_middle(self: CompressionModule, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 33:
            die()

    run = run_of(tmp_path)
    with monkeypatch.context() as patch:
        if where == "in the middle":
            patch.setattr(CompressionModule, "on_train_batch_start", in_the_middle)
        else:
            patch.setattr(StopEarly, "on_train_end", die)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            run_stages(run)
    run_stages(run)
    assert run.record("dense").early_stopping == done.record("dense").early_stopping
    expected, found = weights(done), weights(run)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.dense.max_steps=9", "the first validation is at the end of an epoch of 10 steps, but max_steps is 9"),
        ("data.args={validated: false}", "the data has no validation batches"),
    ],
)
def test_a_stage_without_a_validation_is_refused(override: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(QatkitError) as caught:
        run_stages(run_of(tmp_path, override))
    assert_says(str(caught.value), "stages.dense.early_stopping", says)


@pytest.mark.parametrize(
    ("override", "key", "says"),
    [
        ("stages.dense.early_stopping.patience=0", "stages.dense.early_stopping.patience", "a positive integer"),
        (
            "stages.dense.early_stopping.min_delta=-1.0",
            "stages.dense.early_stopping.min_delta",
            "use a non-negative number",
        ),
        ("stages.dense.max_steps=0", "stages.dense.early_stopping", "does not train"),
        (
            "stages.dense.prune={ramp: {final: 0.5}}",
            "stages.dense.early_stopping",
            "prune.ramp prunes until the stage ends",
        ),
    ],
)
def test_a_block_that_makes_no_sense_is_refused_by_its_key(override: str, key: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "stopped.yaml").write_text(RECIPE)
    assert_says(refusal(tmp_path / "stopped.yaml", override), key, says)
