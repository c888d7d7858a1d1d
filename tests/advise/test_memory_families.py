"""The predicted memory of a step for models other than a plain Llama, and for classified texts and pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qatkit.advise.plan import plan_recipe
from qatkit.recipe.loading import load_recipe
from tests.data.corpus import SENTENCES, save_tokenizer, write_lines
from tests.models.families import tiny
from tests.support.memory import measured

RECIPE = """
name: tiny
model: {{factory: "qatkit.models:{model}", args: {{name_or_path: {folder}/model{model_args}}}}}
data:
  factory: "qatkit.data:{data}"
  args:
    source: {{path: {folder}/records.jsonl, val_fraction: 0.2, test_fraction: 0.2}}
    tokenizer: {folder}/tokenizer
    context: 48
    {data_args}
trainer: {{accelerator: cpu}}
stages:
  dense: {{max_steps: 3, batch_size: 4{stage}}}
"""
CASES: dict[str, tuple[str, str, dict[str, str]]] = {
    "mixtral": ("mixtral", "CausalLM", {"model": "causal_lm", "data": "causal_text"}),
    "mixtral with adapters": (
        "mixtral", "CausalLM", {"model": "causal_lm", "data": "causal_text", "stage": ", lora: {rank: 4}"},
    ),
    "bert, masked": ("bert", "MaskedLM", {"model": "masked_lm", "data": "masked_text"}),
    "bert, classes": (
        "bert", "MaskedLM",
        {
            "model": "sequence_classifier", "data": "text_classification", "model_args": ", num_classes: 3",
            "data_args": "classes: [a, b, c]\n    truncate: true",
        },
    ),
    "llama, classes": (
        "llama", "CausalLM",
        {
            "model": "sequence_classifier", "data": "text_classification", "model_args": ", num_classes: 3",
            "data_args": "classes: [a, b, c]\n    truncate: true", "stage": ", lora: {rank: 4}",
        },
    ),
    "bert, pairs": (
        "bert", "MaskedLM",
        {"model": "embedding_model", "data": "text_pairs", "data_args": "columns: [text, other]\n    truncate: true"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_what_was_predicted(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    family, kind, options = CASES[case]
    padding: dict[str, Any] = {"pad_token_id": 301} if family == "llama" else {}
    tiny(family, kind, vocab_size=302, **padding).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "tokenizer", mask_token="<mask>", pad_token="<pad>")
    records = [{"text": text * 9, "other": text * 8, "label": "abc"[len(text) % 3]} for text in SENTENCES]
    write_lines(tmp_path / "records.jsonl", records)
    fields = {"folder": tmp_path, "model_args": "", "data_args": "", "stage": ""} | options
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(**fields))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    (plan,) = plan_recipe(recipe)
    assert plan.unknown == ""
    found = measured(recipe, "dense", tmp_path / "run")
    assert abs(plan.memory.total / found - 1) < 0.15, f"{plan.memory.total} predicted, {found} measured"
