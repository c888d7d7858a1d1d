"""What a stage's result depends on: the content of its files too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qatkit.models import llama
from qatkit.recipe import EarlyStoppingConfig, FactoryConfig, Recipe, SamplesConfig, StageConfig
from qatkit.run.fingerprint import _files, stage_inputs


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


def test_a_model_that_is_trained_again_in_its_folder_counts_and_a_copy_of_it_does_not(tmp_path: Path) -> None:
    for name in ("model", "copy"):
        torch.manual_seed(0)
        model = llama(64, 16, 1, 2, 1, 16, 16)
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]

    def inputs(folder: str) -> dict[str, object]:
        model = FactoryConfig("qatkit.models:causal_lm", {"name_or_path": str(tmp_path / folder)})
        stages = {"dense": StageConfig(1), "next": StageConfig(1, model=model)}
        return stage_inputs(Recipe("x", model, FactoryConfig("qatkit.data:digits"), stages), "next")

    keys = [f"{at}.args.name_or_path (content)" for at in ("model", "stages.next.model")]
    before = inputs("model")
    assert [before[key] for key in keys] == [inputs("copy")[key] for key in keys]
    (tmp_path / "model" / "README.md").write_text("read me")
    assert inputs("model") == before
    with torch.no_grad():
        model.lm_head.weight[5, 7] += 1e-3  # type: ignore[union-attr,index]
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    assert [key for key, value in inputs("model").items() if value != before[key]] == keys


@pytest.mark.parametrize("place", [8, 30 * 2**20, 70 * 2**20])
def test_of_a_large_file_samples_count_from_its_beginning_to_its_end(tmp_path: Path, place: int) -> None:
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(71 * 2**20)
    model = FactoryConfig("qatkit.models:causal_lm", {"name_or_path": str(tmp_path)})
    recipe = Recipe("x", model, FactoryConfig("qatkit.data:digits"), {"dense": StageConfig(1)})
    before = stage_inputs(recipe, "dense")
    with (tmp_path / "model.safetensors").open("rb+") as file:
        file.seek(place)
        file.write(b"x" * 2**18)  # more than lies between two samples
    assert stage_inputs(recipe, "dense") != before


def test_a_folder_that_is_of_no_model_counts_by_its_name_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    model = FactoryConfig("qatkit.models:mlp", {"name_or_path": str(tmp_path), "other": "~nobody_here/x"})
    recipe = Recipe("x", model, FactoryConfig("qatkit.data:digits"), {"dense": StageConfig(1)})
    assert not [key for key in stage_inputs(recipe, "dense") if "content" in key]


def test_an_empty_argument_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert list(_files({"column": "", "folder": "."}, "data.args")) == [("data.args.folder", Path("."))]


def test_a_split_of_the_hub_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "cat" / "0.png").touch()
    (tmp_path / "photos").symlink_to("test")
    monkeypatch.chdir(tmp_path)
    on_hub = {"source": {"path": "owner/photos", "test": "test"}}
    assert list(_files(on_hub, "data.args")) == []
    local = {"source": {"path": "photos", "test": "test"}}
    assert [name for name, _ in _files(local, "data.args")] == ["data.args.source.path", "data.args.source.test"]
