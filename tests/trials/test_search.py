"""`qatkit search`: the smallest formats within a loss, decided without the test split, and measured on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import norm

from qatkit.quantization.mixed.records import Group, Option, Sensitivity
from qatkit.schemes import scheme
from qatkit.trials.ladder import climb, ladder
from qatkit.trials.promise import _interval, _worst
from tests.cli.in_process import qatkit

RECIPE = """\
name: searched
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [32, 32], num_classes: 10}}
data: {factory: "qatkit.data:digits", args: {val_fraction: 0.2, test_fraction: 0.2}}
trainer: {accelerator: cpu, devices: 1}
stages:
  dense: {max_steps: 150, batch_size: 32, lr: 3.0e-3}
  qat: {max_steps: 40, batch_size: 32, lr: 1.0e-3, distill: {}, quantize: {weight: {num_bits: 8}}}
export: {format: onnx}
"""


def measured() -> Sensitivity:
    def options(scale: float) -> dict[str, Option]:
        return {"W8A16": Option(80, 0.01 * scale), "W4A16": Option(40, 0.1 * scale), "W2A16": Option(20, scale)}

    groups = (Group(("a",), 80, options(1.0)), Group(("b",), 80, options(10.0)))
    return Sensitivity(1.0, {name: scheme(name) for name in ("W8A16", "W4A16", "W2A16")}, groups)


def test_a_ladder_has_the_least_predicted_increase_of_every_size() -> None:
    rungs = ladder(measured(), 8)
    assert (rungs[0].bytes, rungs[-1].bytes) == (40, 160)
    assert [rung.bytes for rung in rungs] == sorted({rung.bytes for rung in rungs})
    assert [rung.increase for rung in rungs] == sorted((rung.increase for rung in rungs), reverse=True)
    mixed = next(rung for rung in rungs if rung.bytes == 60)
    assert mixed.formats == {"a": "W2A16", "b": "W4A16"}, "the layer that loses less has fewer bits"
    assert mixed.layers == {"a": {"scheme": "W2A16"}, "b": {"scheme": "W4A16"}}


@pytest.mark.parametrize(("needed", "trained"), [(5, [7, 3, 5, 4, 5]), (0, [7, 3, 1, 0, 0]), (7, [7, 3, 5, 6, 7])])
def test_a_search_trains_the_smallest_rung_within_the_limit(needed: int, trained: list[int]) -> None:
    steps = climb(8, 0.01, lambda rung, full: 0.0 if rung >= needed else 0.1, share=0.25, budget=2.0)
    assert [step.rung for step in steps] == trained
    assert [step.full for step in steps] == [False] * 4 + [True]
    assert steps[-1].within


def test_a_full_training_that_fails_is_followed_by_a_larger_rung_within_the_budget() -> None:
    def lost(rung: int, full: bool) -> float:
        return 0.1 if rung < (4 if full else 2) else 0.0

    assert [(step.rung, step.full) for step in climb(4, 0.01, lost, 0.25, budget=2.0)][-1] == (2, True)
    steps = climb(4, 0.01, lost, 0.25, budget=4.0)
    assert [(step.rung, step.full, step.within) for step in steps[-2:]] == [(2, True, False), (3, True, False)]
    (only,) = climb(4, 0.01, lost, 0.25, budget=1.0)
    assert (only.rung, only.full) == (3, True), "without a budget for short trainings, the largest is trained"


def test_the_interval_is_that_of_the_paired_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (500,), generator=generator)
    correct = (torch.rand(2, 500, generator=generator) < torch.tensor([[0.9], [0.8]])).double()
    losses = torch.rand(2, 500, generator=generator, dtype=torch.float64)
    pairs = [(labels[part], correct[:, part], losses[:, part]) for part in (slice(0, 200), slice(200, 500))]
    for metric, values in (("accuracy", correct[0] - correct[1]), ("perplexity", losses[1] - losses[0])):
        array = values.numpy()
        expected = norm.interval(0.95, array.mean(), array.std(ddof=1) / 500**0.5)
        found = _interval(metric, pairs)
        assert found is not None
        if metric == "perplexity":
            found = tuple(float(torch.tensor(value, dtype=torch.float64).log1p()) for value in found)  # type: ignore[assignment]
        assert found == pytest.approx(expected, rel=1e-6)
    assert _interval("f1", pairs) is None
    worst = _worst(pairs)
    by_class = [float((correct[0] - correct[1])[labels == index].mean()) for index in range(3)]
    assert worst == (by_class.index(max(by_class)), pytest.approx(max(by_class)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    (folder / "searched.yaml").write_text(RECIPE)
    (folder / "formats.yaml").write_text(CANDIDATES)
    (folder / "smallest.yaml").write_text(CANDIDATES.splitlines()[-1])
    return folder


CANDIDATES = """\
int8: {weight: {num_bits: 8}}
int4: {weight: {num_bits: 4}}
int2: {weight: {num_bits: 2}}
"""
ARGUMENTS = ("search", "searched.yaml", "--max-loss", "3%", "--candidates", "formats.yaml", "--out", "out")


@pytest.fixture(scope="module")
def ended(folder: Path) -> tuple[int, str, str]:
    return qatkit(*ARGUMENTS, cwd=folder)


def test_the_result_is_smaller_and_keeps_its_promise(folder: Path, ended: tuple[int, str, str]) -> None:
    code, output, err = ended
    assert code == 0, output + err
    found: dict[str, Any] = json.loads((folder / "out" / "search.json").read_text())
    assert found["kept"]
    assert found["promise"]["lost"] <= 0.03
    assert found["promise"]["samples"] == 360
    assert found["bytes"] < found["dense_bytes"] / 3
    assert "KEPT: at most 3.00%; accuracy" in output
    file = Path(found["file"])
    verification = json.loads(((folder / file).parent / "verification.json").read_text())
    assert verification["runtime_metric"] == pytest.approx(found["promise"]["found"])
    trained = [each for each in (folder / "out" / "stages").iterdir() if each.name.startswith("dense-")]
    assert len(trained) == 1, "the dense stage is trained once"


def test_a_search_that_runs_again_trains_nothing_and_finds_the_same(folder: Path, ended: tuple[int, str, str]) -> None:
    stages = {path: path.stat().st_mtime_ns for path in (folder / "out" / "stages").rglob("stage.json")}
    assert qatkit(*ARGUMENTS, cwd=folder)[0] == ended[0]
    assert {path: path.stat().st_mtime_ns for path in (folder / "out" / "stages").rglob("stage.json")} == stages


def test_a_promise_that_is_broken_is_said(folder: Path, ended: tuple[int, str, str]) -> None:
    code, output, _ = qatkit(
        *ARGUMENTS[:3], "0%", "--candidates", "smallest.yaml", "--budget", "1", "--out", "bad", cwd=folder
    )
    assert code == 1, output
    assert "NOT KEPT: more than 0.00%" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--max-loss", "much"), "--max-loss: 'much' is not a part; use a value such as 1% or 0.01"),
        (("export=null",), "export: a search measures exported files; add export: {format: onnx}"),
        (("export.format=mlx",), "export.format: a search measures files in their runtime, but MLX does not run"),
        (("stages.qat.quantize=null",), "stages.qat: a search changes the formats of the last stage"),
        (
            ("stages.qat.quantize.layers={'*': {scheme: W4A16}}",),
            "a search sets the format of every layer",
        ),
    ],
)
def test_what_a_search_needs_is_said(folder: Path, arguments: tuple[str, ...], said: str) -> None:
    code, output, err = qatkit("search", "searched.yaml", *arguments, *ARGUMENTS[4:6], "--out", "none", cwd=folder)
    assert code == 2, output
    assert said in err
