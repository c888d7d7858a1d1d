"""Stages that start from any earlier stage, and teachers that are no ancestors of what they teach."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.validation import validate_recipe
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.support.recipes import assert_says, refusal

RECIPE = """
name: branches
model: {factory: "qatkit.models:mlp", args: {hidden: [16]}}
data: {factory: "qatkit.data:digits"}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 8}
  sparse: {max_steps: 4, prune: {sparsity: 0.5}}
  beside: {max_steps: 4, start: dense}
  wide: {max_steps: 8, model: {factory: "qatkit.models:mlp", args: {hidden: [24]}}}
  taught: {max_steps: 4, start: dense, distill: {teacher: wide}}
  after: {max_steps: 4}
export: {format: dense}
"""


def run_of(folder: Path, *overrides: str) -> Run:
    (folder / "branches.yaml").write_text(RECIPE)
    return Run(load_recipe(folder / "branches.yaml", list(overrides)), folder / "run")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = run_of(tmp_path_factory.mktemp("branches"))
    validate_recipe(run.recipe)
    assert run_stages(run) == list(run.recipe.stages)
    return run


@pytest.mark.parametrize(
    ("stage", "before"),
    [
        ("dense", None),
        ("sparse", "dense"),
        ("beside", "dense"),
        ("wide", None),
        ("taught", "dense"),
        ("after", "taught"),
    ],
)
def test_a_stage_goes_on_with_the_named_stage_or_the_one_before(done: Run, stage: str, before: str | None) -> None:
    assert done.recipe.parent_of(stage) == before
    if before is not None:
        start, left = done.start_model(stage).state_dict(), done.load_model(before).state_dict()
        assert all(torch.equal(start[key], left[key]) for key in left)


@pytest.mark.parametrize(
    ("stages", "teacher"),
    [
        ("a: {max_steps: 1}, b: {max_steps: 1, QUANT}, c: {max_steps: 1, DISTIL}", "a"),
        ("a: {max_steps: 1}, b: {max_steps: 1}, c: {max_steps: 1, QUANT, DISTIL}", "b"),
        # what other branches did does not count
        ("a: {max_steps: 1}, x: {max_steps: 0, QUANT}, b: {max_steps: 0, start: a}, c: {max_steps: 1, DISTIL}", "b"),
        ("a: {max_steps: 1}, x: {max_steps: 1}, c: {max_steps: 1, start: a, QUANT, DISTIL}", "a"),
        ("a: {max_steps: 1}, b: {max_steps: 1, MODEL}, c: {max_steps: 1, QUANT, DISTIL}", "a"),
        ("a: {max_steps: 1}, b: {max_steps: 1, MODEL}, c: {max_steps: 1, MODEL, DISTIL}", "a"),
        ("a: {max_steps: 1, QUANT}, c: {max_steps: 1, DISTIL}", None),
        ("a: {max_steps: 1}, b: {max_steps: 1, QUANT}, c: {max_steps: 1, distill: {teacher: b}}", "b"),
    ],
)
def test_where_none_is_named_the_teacher_is_the_model_before_the_first_compression_on_the_way(
    tmp_path: Path, stages: str, teacher: str | None
) -> None:
    for short, block in {
        "QUANT": "quantize: {weight: {num_bits: 4}}",
        "DISTIL": "distill: {alpha: 0.5}",
        "MODEL": 'model: {factory: "qatkit.models:mlp", args: {hidden: [8]}}',
    }.items():
        stages = stages.replace(short, block)
    head = RECIPE.partition("stages:")[0]
    (tmp_path / "way.yaml").write_text(f"{head}stages: {{{stages}}}\n")
    assert load_recipe(tmp_path / "way.yaml").teacher_of("c") == teacher


def test_only_stages_of_the_branch_hold_its_zeros(done: Run) -> None:
    assert {name: bool(done.record(name).zeros) for name in done.recipe.stages} == {
        "dense": False, "sparse": True, "beside": False, "wide": False, "taught": False, "after": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("stages.sparse.lr=1e-4", ["sparse"]),
        ("stages.wide.lr=1e-4", ["wide", "taught", "after"]),  # it teaches, and is nobody's ancestor
        ("stages.dense.lr=1e-4", ["dense", "sparse", "beside", "taught", "after"]),
    ],
)
def test_a_change_runs_those_stages_again_that_depend_on_it(
    done: Run, tmp_path: Path, override: str, again: list[str]
) -> None:
    shutil.copytree(done.out, tmp_path / "run")
    assert run_stages(run_of(tmp_path, override), force=True) == again


@pytest.mark.parametrize(
    ("override", "key", "said"),
    [
        ("beside.start=after", "beside.start", "'after' is not an earlier stage; use one of dense, sparse"),
        ("beside.start=beside", "beside.start", "'beside' is not an earlier stage"),
        ("wide.start=dense", "wide.start", "'dense' and a model are both set"),
    ],
)
def test_a_start_that_cannot_be_is_refused_by_its_key(tmp_path: Path, override: str, key: str, said: str) -> None:
    (tmp_path / "branches.yaml").write_text(RECIPE)
    assert_says(refusal(tmp_path / "branches.yaml", f"stages.{override}"), f"stages.{key}", said)
