"""Companion files: the exported config matches untied weights, and verification finds every change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qatkit import QuantSpec, prepare_qat
from qatkit.export import export_compressed
from qatkit.export.companions import compare_companions, save_companions

TOKENS = torch.arange(20).view(2, 10)


@pytest.fixture
def model() -> Any:
    """A Llama with `tie_word_embeddings: true` in its config and separate output weights."""
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    made.lm_head.weight = nn.Parameter(made.lm_head.weight.detach() * 2)
    return made


class Words:
    """A tokenizer of one file."""

    def __init__(self, text: str) -> None:
        self.text = text

    def save_pretrained(self, folder: Path) -> None:
        (folder / "words.txt").write_text(self.text)


def test_separate_weights_load_as_they_are_although_the_models_config_says_tied(model: Any, tmp_path: Path) -> None:
    prepare_qat(model, QuantSpec(4))
    export_compressed(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert model.config.tie_word_embeddings, "the model is left as it was"


def test_a_changed_config_generation_config_or_tokenizer_is_named(model: Any, tmp_path: Path) -> None:
    names = ("config", "generation_config", "tokenizer")
    save_companions(names, model, Words("a b"), tmp_path)
    assert compare_companions(names, model, Words("a b"), tmp_path) == []
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 7}))
    assert compare_companions(names, model, Words("a c"), tmp_path) == [
        'config.json: \'hidden_act\' is "gelu", but "silu" in the trained model',
        "generation_config.json: 'eos_token_id' is 7, but 2 in the trained model",
        "words.txt: the content differs from the trained model's",
    ]
    (tmp_path / "words.txt").unlink()
    assert "words.txt: not in the folder" in compare_companions(names, model, Words("a b"), tmp_path)
