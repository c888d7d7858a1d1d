"""Several runs in one page: latencies of one process, the Pareto front and the differences between recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qatkit.report.comparison import front, recipe_differences
from qatkit.tasks.metrics import METRICS
from tests.cli.in_process import qatkit

RECIPE = """
name: pair
model: {factory: "qatkit.models:mlp", args: {hidden: [16]}}
data: {factory: "qatkit.data:digits", args: {val_fraction: 0.1, test_fraction: 0.1}}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 3, batch_size: 32}
  int8: {max_steps: 2, batch_size: 32, quantize: {target: onnxruntime}}
export: {format: onnx}
"""


def row(accuracy: float, size: int, *latencies: float) -> dict[str, Any]:
    times = [{"batch_size": size, "median_ms": time} for size, time in zip((1, 64), latencies, strict=False)]
    return {"test_accuracy": accuracy, "test_loss": 1 - accuracy, "bytes": size, "latency": times}


def test_a_file_is_on_the_front_unless_another_one_is_as_good_in_everything_and_better_in_something() -> None:
    accuracy = METRICS["accuracy"]
    rows = [
        (accuracy, "digits", row(0.9, 100, 1.0, 9.0)),
        (accuracy, "digits", row(0.9, 100, 1.0, 8.0)),
        (accuracy, "digits", row(0.8, 50, 2.0, 9.0)),
    ]
    assert front(rows, joint=True) == [False, True, True]
    assert front(rows, joint=False) == [True, True, True]  # equal in accuracy and size
    assert front([*rows, (accuracy, "digits", row(0.95, 40, 0.5, 1.0))], joint=True) == [False, False, False, True]


def test_a_small_loss_is_good_and_files_with_other_metrics_are_not_compared() -> None:
    loss = METRICS["loss"]
    rows = [(loss, "x", row(0.9, 100)), (loss, "x", row(0.8, 100)), (METRICS["accuracy"], "x", row(0.1, 200))]
    assert front(rows, joint=False) == [True, False, True]
    assert front([*rows[:1], (loss, "y", row(0.8, 100))], joint=False) == [True, True]


def test_recipes_differ_by_key_and_a_missing_key_is_a_dash() -> None:
    one, two = "a: {b: 1, c: [1, 2], d: x}", "a: {b: 1, c: [1, 3]}"
    assert recipe_differences([one, two], ["x", "y"]) == [
        ["key", "x", "y"],
        ["a.c", "[1, 2]", "[1, 3]"],
        ["a.d", "x", "-"],
    ]
    assert recipe_differences([one, one], ["x", "y"]) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pair")
    (made / "pair.yaml").write_text(RECIPE)
    for name, steps in (("one", 2), ("two", 4)):
        done = qatkit("run", "pair.yaml", f"stages.int8.max_steps={steps}", "--out", name, "--quiet", cwd=made)
        assert done.code == 0, done.err
    return made


def test_the_files_of_all_runs_are_measured_in_one_process_and_reports_stay_as_they_are(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.glob("*/report.json")}
    done = qatkit("report", "one", "two", cwd=folder)
    assert done.code == 0, done.err
    assert done.out == "page: report.html\n"
    text = (folder / "report.html").read_text()
    assert "All files were measured alternately in one process" in text
    assert "on the Pareto front" in text
    assert "<code>stages.int8.max_steps</code>" in text
    assert {path: path.read_bytes() for path in folder.glob("*/report.json")} == before


def test_json_of_several_runs_is_refused(folder: Path) -> None:
    done = qatkit("report", "one", "two", "--json", cwd=folder)
    assert done.code == 2
    assert "--json: this option supports only a single run" in done.err


def test_a_stage_with_the_name_of_a_baseline_keeps_its_row(tmp_path: Path) -> None:
    (tmp_path / "pair.yaml").write_text(RECIPE.replace("int8:", "quantize_static:"))
    done = qatkit("run", "pair.yaml", "--out", "run", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "a stage has the same name, 'quantize_static'; rename the stage" in done.out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["file"] for row in report["rows"]] == ["dense", "quantize_static"]
    assert [row["failure"] != "" for row in report["baselines"]] == [True]


def test_a_file_that_has_changed_is_not_measured(folder: Path) -> None:
    file = folder / "two" / "export" / "int8" / "onnx" / "model.onnx"
    content = file.read_bytes()
    try:
        file.write_bytes(content + b" ")
        done = qatkit("report", "one", "two", cwd=folder)
    finally:
        file.write_bytes(content)
    assert done.code == 0, done.err
    assert "not comparable between runs" in done.out
    assert "the file has changed since verification" in done.out
    assert "Latencies are comparable only within a run" in (folder / "report.html").read_text()


def test_latencies_are_compared_although_the_main_format_has_none(folder: Path) -> None:
    for name in ("first", "second"):
        formats = "export=[{format: dense}, {format: onnx}]"
        done = qatkit("run", "pair.yaml", formats, "--out", name, "--quiet", cwd=folder)
        assert done.code == 0, done.err
    done = qatkit("report", "first", "second", cwd=folder)
    assert (done.code, done.out) == (0, "page: report.html\n")
    assert "All files were measured alternately in one process" in (folder / "report.html").read_text()
