"""What a stage's result depends on: the content of its files too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qatkit.fingerprint import stage_inputs
from qatkit.recipe import EarlyStoppingConfig, FactoryConfig, Recipe, SamplesConfig, StageConfig


def test_the_content_of_files_counts_also_of_those_that_a_glob_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(name)

    def inputs(path: str) -> dict[str, object]:
        data = FactoryConfig("qatkit.data:causal_text", {"source": {"path": path}, "tokenizer": "x"})
        return stage_inputs(Recipe("x", FactoryConfig("qatkit.models:mlp"), data, {"dense": StageConfig(1)}), "dense")

    for path in ("a.jsonl", "*.jsonl"):
        before = inputs(path)
        (tmp_path / "a.jsonl").write_text(f"changed by {path}")
        assert inputs(path) != before
    before = inputs("*.jsonl")
    (tmp_path / "c.jsonl").write_text("new")
    assert set(inputs("*.jsonl")) - set(before) == {"data.args.source.path c.jsonl (content)"}


def test_what_is_only_to_be_read_may_change_and_what_trains_may_not() -> None:
    def inputs(**options: Any) -> dict[str, object]:
        model, data = FactoryConfig("qatkit.models:mlp"), FactoryConfig("qatkit.data:digits")
        return stage_inputs(Recipe("x", model, data, {"dense": StageConfig(10, **options)}), "dense")

    assert inputs(samples=SamplesConfig(5, ["def"])) == inputs()
    for options in ({"optimizer": "adamw8bit"}, {"schedule": "wsd"}, {"early_stopping": EarlyStoppingConfig()}):
        assert inputs(**options) != inputs(), options
