"""Embedding distillation from a recipe: a pretrained encoder, pairs of texts, and the memory that is predicted."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import transformers

from qatkit.advise.plan import plan_recipe
from qatkit.pipeline.export import export_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.verify import verify_run
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


def save_encoder(folder: Path) -> None:
    """A tiny encoder with its tokenizer, and pairs of texts."""
    save_tokenizer(folder)
    config = transformers.BertConfig(
        vocab_size=len(transformers.AutoTokenizer.from_pretrained(folder)), hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    pairs = [{"text": f"{text} {row}", "partner": f"{row} {text}"} for row in range(4) for text in SENTENCES]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))


def test_embeddings_of_a_pretrained_encoder_are_distilled_and_their_memory_is_predicted(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    (tmp_path / "encoder.yaml").write_text(RECIPE.format(folder=tmp_path))
    recipe = load_recipe(tmp_path / "encoder.yaml")
    for plan in plan_recipe(recipe):
        assert plan.unknown == ""
        assert plan.memory.activations > 0
    run = Run(recipe, tmp_path / "run")
    run_stages(run)
    assert run.record("qat").metrics["test/accuracy"] >= 0


def test_an_encoder_with_integer_embeddings_is_exported_and_verified(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    quantize = (
        "{target: onnxruntime-dynamic, include: ['*', '*_embeddings'], exclude: ['*pooler*'], "
        "layers: {'*_embeddings': {weight: {num_bits: 8}}}}"
    )
    text = RECIPE.format(folder=tmp_path).replace("export: null", "export: {format: onnx}")
    (tmp_path / "encoder.yaml").write_text(text.replace("{weight: {num_bits: 8, strategy: channel}}", quantize))
    run = Run(load_recipe(tmp_path / "encoder.yaml"), tmp_path / "run")
    run_stages(run)
    (_, qat) = export_run(run)
    assert all(result.passed for result in verify_run(run).values())
    codes = [tensor.name for tensor in onnx.load(qat).graph.initializer if tensor.name.endswith("weight.codes")]
    assert len(codes) == 9, "three tables and six linear layers"
