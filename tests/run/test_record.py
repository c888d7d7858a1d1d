"""Records of stages: what is written is read, and anything else is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qatkit import QatkitError
from qatkit.common.records import content_digest
from qatkit.pipeline.runner import run_stages
from qatkit.recipe import FactoryConfig
from qatkit.recipe.loading import load_recipe
from qatkit.run.architecture import Architecture
from qatkit.run.folder import Run
from qatkit.run.record import (
    StageRecord,
    Started,
    read_record,
    read_started,
    write_record,
    write_started,
)

RECORD = StageRecord(
    name="dense", fingerprint="abc", inputs={"seed": 1, "stages.dense.lr": 1e-3}, folds=[("conv", "bn")],
    zeros={"conv": 3}, architecture=Architecture(FactoryConfig("qatkit.models:mlp", {"hidden": [4]})),
    seconds=1.5, versions={"qatkit": "0.1"},
)  # fmt: skip


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert (read_record(tmp_path), read_started(tmp_path)) == (None, None)
    write_record(tmp_path, RECORD)
    write_started(tmp_path, started := Started({"seed": 1}, "abc", processes=2))
    assert read_record(tmp_path) == RECORD
    assert read_started(tmp_path) == started
    assert json.loads((tmp_path / "stage.json").read_text())["schema"] == 1


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (without("schema"), r"has schema None, .* reads schema 1; use --force .*, or use qatkit 0\.1, which wrote it"),
        (lambda content: content | {"schema": 2}, "has schema 2"),
        (without("fingerprint"), r"is corrupt \(fingerprint is missing\); restore the file, or use --force"),
        (lambda content: content | {"metrics": {"test/loss": "low"}}, r"is corrupt \(metrics.test/loss is a str\)"),
        (lambda content: content | {"inputs": 3}, r"is corrupt \(inputs is a int\)"),
        (lambda content: content | {"colour": "red"}, r"is corrupt \(unknown field colour\)"),
        (lambda content: content | {"zeros": [1]}, r"is corrupt \(zeros is a list\)"),
        (lambda content: content | {"seconds": True}, r"is corrupt \(seconds is a bool\)"),
        (lambda content: content | {"folds": [["conv"]]}, r"is corrupt \(folds\[0\] has 1 values instead of 2\)"),
        (lambda content: content | {"architecture": {}}, r"is corrupt \(architecture\.config is missing\)"),
        (lambda content: [content], r"is corrupt \(the file contains a list, not an object\)"),
    ],
)
def test_another_record_is_refused_by_its_path(change: Any, problem: str, tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)
    path = tmp_path / "stage.json"
    content = change(json.loads(path.read_text()))
    signed = content | {"digest": content_digest(content)} if isinstance(content, dict) else content
    path.write_text(json.dumps(signed))
    with pytest.raises(QatkitError, match=problem) as caught:
        read_record(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "null", "[" * 5000, '{"schema": 1}', '{"schema": 1, "inputs": 3}'])
def test_a_torn_file_is_an_error_without_a_traceback(content: str, tmp_path: Path) -> None:
    for name, read in (("stage.json", read_record), ("started.json", read_started)):
        (tmp_path / name).write_text(content)
        with pytest.raises(QatkitError, match=name):
            read(tmp_path)


@pytest.mark.parametrize("name", ["stage.json", "started.json"])
def test_a_stage_of_another_schema_runs_again_with_force(name: str, tmp_path: Path) -> None:
    run = Run(load_recipe("vision/digits_int4", ["stages.dense.max_steps=2"]), tmp_path)
    run.folder("dense").mkdir(parents=True)
    (run.folder("dense") / name).write_text('{"schema": 0, "name": "dense"}')
    with pytest.raises(QatkitError, match="use --force to rerun the stage"):
        run_stages(run, until="dense")
    assert run_stages(run, until="dense", force=True) == ["dense"]
