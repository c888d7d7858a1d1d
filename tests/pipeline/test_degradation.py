"""A stage that makes its model worse says so, and data with NaN is named before its metrics are believed."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from qatkit import QatkitWarning
from qatkit.pipeline.degradation import Before, start_metric
from qatkit.pipeline.runner import run_stages
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from qatkit.tasks import METRICS, TASKS

RECIPE = """
name: worse
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [16], num_classes: 10}}
data: {factory: "tests.pipeline.test_degradation:scans"}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 40, lr: 1.0e-2}
  qat: {max_steps: 5, lr: 10.0, quantize: {weight: {num_bits: 2}}}
"""


def scans(batch_size: int = 8, seed: int = 0, spoiled: bool = False) -> Any:
    """The digits; one image of validation and one of test may contain NaN."""
    from qatkit.data import digits

    data = digits(batch_size=batch_size, seed=seed)
    if spoiled:
        data.val.tensors[0][70, 0, 3, 3] = torch.nan  # type: ignore[attr-defined]
        data.test.tensors[0][0] = torch.inf  # type: ignore[attr-defined]
    return data


def run_of(folder: Path, *overrides: str) -> Run:
    (folder / "worse.yaml").write_text(RECIPE)
    return Run(load_recipe(folder / "worse.yaml", list(overrides)), folder / "run", ["tests"])


def told(run: Run, until: str | None = None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", QatkitWarning)
        run_stages(run, until)
    return [str(each.message) for each in caught if issubclass(each.category, QatkitWarning)]


def test_a_stage_that_ruins_its_model_says_from_what_to_what(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    (found,) = told(run)
    dense, qat = (run.record(name).metrics["val/accuracy"] for name in ("dense", "qat"))
    assert qat < dense
    assert found.startswith("stages.qat: validation accuracy fell from ")
    assert found.endswith(f" to {qat:.4g} in this stage; use a smaller lr, a warmup or gradient_clip: 1.0")
    words = found.split()
    # measured after the layers were quantized: the accuracy that 2 bits cost is not the fault of the training
    assert qat < float(words[words.index("from") + 1]) < dense


def test_validation_and_test_data_with_nan_are_named(tmp_path: Path) -> None:
    found = told(run_of(tmp_path, "data.args.spoiled=true", "stages.dense.max_steps=30"), until="dense")
    assert found == [
        "data: 'inputs' of validation batch 2 of 3 contains non-finite values; the metrics include the "
        "predictions for this data; remove the non-finite samples from the data",
        "data: 'inputs' of validation batch 2 of 3 contains non-finite values; the metrics include the "
        "predictions for this data; remove the non-finite samples from the data",
        "data: 'inputs' of test batch 1 of 6 contains non-finite values; the metrics include the predictions "
        "for this data; remove the non-finite samples from the data",
    ]


@pytest.mark.parametrize(
    ("metric", "before", "after", "count", "worse"),
    [
        ("accuracy", 0.80, 0.33, 180, True),
        ("accuracy", 0.80, 0.70, 180, False),  # within the noise of 180 samples
        ("accuracy", 0.80, 0.70, 10_000, True),
        ("accuracy", 0.33, 0.80, 180, False),
        ("f1", 0.80, 0.33, 180, True),
        ("perplexity", 10.0, 10.4, 5000, False),
        ("perplexity", 10.0, 11.0, 5000, True),
        ("perplexity", 10.0, 2.0, 5000, False),
        ("loss", 1.0, math.nan, 5000, True),
        ("rmse", 1.0, 1.1, 5000, True),
        ("iou", 0.80, 0.79, 1_000_000, False),  # pixels of one image are not independent samples
        ("iou", 0.80, 0.70, 1_000_000, True),
        ("iou", 0.70, 0.80, 1_000_000, False),
        ("iou", 0.80, math.nan, 1_000_000, True),
    ],
)
def test_worse_is_beyond_noise_in_the_direction_of_the_metric(
    metric: Any, before: float, after: float, count: int, worse: bool
) -> None:
    assert Before(metric, before, count).is_better_than(after) is worse


def test_every_metric_of_a_task_has_a_direction() -> None:
    assert {name for task in TASKS.values() for name in task.metrics} <= set(METRICS)


def test_a_stage_that_does_not_train_or_prunes_to_its_end_is_not_compared() -> None:
    prunes = "ramp: {max_steps: 9, prune: {ramp: {final: 0.5}}}, once: {max_steps: 9, prune: {sparsity: 0.5}}"
    stages = f"stages={{none: {{max_steps: 0}}, {prunes}}}"
    compared = {
        name: start_metric(stage, None) is not None
        for name, stage in load_recipe("vision/digits_int4", [stages]).stages.items()
    }
    assert {name: compared[name] for name in ("none", "ramp", "once")} == {"none": False, "ramp": False, "once": True}


def test_the_value_at_the_start_survives_a_resume() -> None:
    stage = load_recipe("vision/digits_int4").stages["dense"]
    first, second = start_metric(stage, None), start_metric(stage, None)
    assert first is not None
    assert second is not None
    second.load_state_dict(first.state_dict())
    assert second.before is None
    first.before = Before("accuracy", 0.8, 180)
    second.load_state_dict(first.state_dict())
    assert second.before == first.before
