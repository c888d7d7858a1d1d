"""Small versions of the shipped pruning recipes, from training to verified exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qatkit.pipeline.export import export_run
from qatkit.pipeline.report import report_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.verify import verify_run
from qatkit.pruning.semi_structured import is_two_of_four
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run

pytestmark = pytest.mark.slow

CNN = ["model.args.channels=[8,8]", "trainer.accelerator=cpu"]
SMALL = {
    "vision/digits_magnitude90": [*CNN, "stages.dense.max_steps=60", "stages.ramp.max_steps=60"],
    "vision/digits_lottery": [
        *CNN, "stages.ticket.max_steps=30", "stages.ticket.lottery.rewind=10", "stages.ticket.lottery.rounds=2"
    ],
    "llm/sparse24": [
        "model.args={vocab_size: 300, hidden: 32, layers: 2, heads: 2, kv_heads: 1, intermediate: 64, context: 16}",
        "data.args={vocab_size: 300, context: 16, include: ['email/*'], val_fraction: 0.2, test_fraction: 0.1, "
        "epoch_batches: 10}",
        "trainer.accelerator=cpu", "stages.dense.max_steps=30", "stages.tune.max_steps=20",
    ],
}  # fmt: skip
ZEROS = {
    "vision/digits_magnitude90": {"ramp": 0.9},
    "vision/digits_lottery": {"ticket_1": 0.2, "ticket_2": 0.36, "ticket_reinit": 0.36},
    "llm/sparse24": {"sparse": 0.5, "tune": 0.5},
}


@pytest.mark.parametrize("name", SMALL)
def test_the_recipe_runs_and_its_files_have_the_expected_sparsity(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = Run(load_recipe(name, SMALL[name]), tmp_path / "run")
    run_stages(run)
    export_run(run)
    assert all(check.passed for check in verify_run(run).values())
    rows = report_run(run)["rows"]
    assert [row["stage"] for row in rows if row["kind"] != "dense"] == list(ZEROS[name])
    for stage, share in ZEROS[name].items():
        model, zeros = run.load_model(stage), run.record(stage).zeros
        weights = {layer: model.get_submodule(layer).weight for layer in zeros}
        assert all(isinstance(weight, torch.Tensor) for weight in weights.values())
        assert sum(zeros.values()) == round(share * sum(weight.numel() for weight in weights.values()))  # type: ignore[operator, union-attr]
        assert name != "llm/sparse24" or all(is_two_of_four(weight) for weight in weights.values())  # type: ignore[arg-type]
