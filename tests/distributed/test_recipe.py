"""The recipe that prunes, distills and quantizes, on two processes: results are finite, sparse and verified."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.recipes.test_sparse_int4_recipe import SMALL
from tests.support import warm

pytestmark = pytest.mark.slow

# the rows of a batch are divided among the processes, so that steps see the same tokens
HALVED = [f"stages.{stage}.batch_size=32" for stage in ("dense", "magnitude24", "one_shot", "sparse24", "int4")]

START = {"ddp": [], "fsdp2": ["stages.sparse24.prune.method=magnitude"]}


def run_of(folder: Path, cache: Path, *overrides: str) -> Run:
    command = [warm.qatkit(), "run", "llm/sparse24_kd_int4", "--out", str(folder), "--quiet", *SMALL, *overrides]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return Run(load_recipe(folder / "recipe.yaml"), folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "recipe_cache"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Run:
    return run_of(tmp_path_factory.mktemp("alone"), cache)


def test_a_start_that_needs_whole_weights_is_refused_where_they_are_sharded(tmp_path: Path) -> None:
    command = [warm.qatkit(), "run", "llm/sparse24_kd_int4", "--out", str(tmp_path), *SMALL]
    sharded = ["trainer.devices=2", "trainer.strategy=fsdp2"]
    done = subprocess.run([*command, *sharded], capture_output=True, text=True)
    assert done.returncode == 2
    assert "stages.sparse24.prune.method: 'sparsegpt' requires unsharded weights, but fsdp2 shards them" in done.stderr


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_run_the_whole_recipe_as_one_does(alone: Run, strategy: str, cache: Path, tmp_path: Path) -> None:
    run = run_of(
        tmp_path / "run", cache, "trainer.devices=2", f"trainer.strategy={strategy}", *HALVED, *START[strategy]
    )
    for stage in run.rows:
        one, two = (r.record(stage).metrics["test/loss"] for r in (alone, run))
        assert abs(one - two) < 0.02 * one, f"{stage}: {one} on one process, {two} on two"
    weights = load_file(run.folder("int4") / "model" / "model.safetensors")
    zeros = run.record("int4").zeros
    assert zeros == run.record("sparse24").zeros
    assert zeros
    for name in zeros:
        kept = (weights[f"{name}.weight"] != 0).view(-1, 4).sum(-1)
        assert (kept <= 2).all(), name
    assert all(torch.isfinite(value).all() for value in weights.values() if value.is_floating_point())
    report = json.loads((run.out / "report.json").read_text())
    assert {row["stage"]: row["verification"]["passed"] for row in report["rows"]} == dict.fromkeys(run.rows, True)
