"""Embedding distillation from a recipe: a pretrained encoder, pairs of texts, and the memory that is predicted."""

from __future__ import annotations

import json
from pathlib import Path

import transformers

from qatkit.advise.plan import plan_recipe
from qatkit.pipeline.runner import run_stages
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.data.corpus import SENTENCES, save_tokenizer

RECIPE = """
name: encoder
model: {{factory: "qatkit.models:embedding_model", args: {{name_or_path: {folder}}}}}
data:
  factory: "qatkit.data:text_pairs"
  args:
    source: {{path: {folder}/pairs.jsonl, val_fraction: 0.2, test_fraction: 0.2}}
    tokenizer: {folder}
    context: 16
trainer: {{accelerator: cpu}}
stages:
  dense: {{max_steps: 2, batch_size: 4}}
  qat:
    max_steps: 2
    batch_size: 4
    distill: {{loss: cosine, alpha: 1.0}}
    quantize: {{weight: {{num_bits: 8, strategy: channel}}}}
export: null
"""


def test_embeddings_of_a_pretrained_encoder_are_distilled_and_their_memory_is_predicted(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    config = transformers.BertConfig(
        vocab_size=len(transformers.AutoTokenizer.from_pretrained(tmp_path)), hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    pairs = [{"text": f"{text} {row}", "partner": f"{row} {text}"} for row in range(4) for text in SENTENCES]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "encoder.yaml").write_text(RECIPE.format(folder=tmp_path))
    recipe = load_recipe(tmp_path / "encoder.yaml")
    for plan in plan_recipe(recipe):
        assert plan.unknown == ""
        assert plan.memory.activations > 0
    run = Run(recipe, tmp_path / "run")
    run_stages(run)
    assert run.record("qat").metrics["test/accuracy"] >= 0
