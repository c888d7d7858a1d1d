"""The models of `deploy.py`: small, with random weights, of the families that people deploy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.data.text import END_OF_TEXT, train_tokenizer
from qatkit.models import cnn, mlp, resnet, untrained_model

VOCABULARY, TOKENS, SAMPLES = 320, 32, 64


@dataclass(frozen=True)
class Model:
    """A network and its data."""

    dense: nn.Module
    inputs: Tensor | Mapping[str, Tensor]
    """The inputs of all samples."""
    batches: list[Any]
    """Batches for verification."""
    task: str
    loss: Callable[[nn.Module], Tensor]
    """``(model)``: the loss on all samples."""
    tokenizer: Any = None
    """The tokenizer of a language model."""


def _vision(build: Callable[[], nn.Module]) -> Model:
    torch.manual_seed(0)
    x, labels = torch.rand(SAMPLES, 1, 16, 16), torch.arange(SAMPLES) % 10
    return Model(
        build().eval(), x, [(x, labels)], "classification", lambda model: F.cross_entropy(model(x), labels)
    )  # fmt: skip


def _text(family: str, head: str, shape: dict[str, Any], **options: Any) -> Model:
    torch.manual_seed(0)
    fixed = {"vocab_size": VOCABULARY, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    dense = untrained_model(family, head, {**fixed, **shape}, **options).eval()
    ids = torch.randint(VOCABULARY, (SAMPLES, TOKENS))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = ids if head == "CausalLM" else torch.arange(SAMPLES) % 3
    task = "causal" if head == "CausalLM" else "text_classification"

    def loss(model: nn.Module) -> Tensor:
        found: Tensor = model(**inputs, labels=labels).loss
        return found

    return Model(dense, inputs, [{**inputs, "labels": labels}], task, loss, language_tokenizer())


def language_tokenizer() -> Any:
    """A small tokenizer of transformers."""
    from transformers import PreTrainedTokenizerFast

    trained = train_tokenizer([__doc__ or ""], VOCABULARY)
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=END_OF_TEXT)


_SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_BERT = {key: value for key, value in _SHAPE.items() if key != "num_key_value_heads"}

MODELS: dict[str, Callable[[], Model]] = {
    "MLP": lambda: _vision(lambda: mlp(in_features=256, hidden=(256, 128))),
    "CNN": lambda: _vision(lambda: cnn(channels=(8, 16, 32), size=16)),
    "ResNet": lambda: _vision(lambda: resnet((16, 32))),
    "BERT": lambda: _text("bert", "SequenceClassification", _BERT, num_classes=3),
    "Llama": lambda: _text("llama", "CausalLM", _SHAPE),
    "Qwen3": lambda: _text("qwen3", "CausalLM", {**_SHAPE, "head_dim": 64}),
    "Gemma3": lambda: _text(
        "gemma3_text", "CausalLM", {**_SHAPE, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 64}
    ),
    "GPT-2": lambda: _text("gpt2", "CausalLM", {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "Mixtral": lambda: _text("mixtral", "CausalLM", {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
"""By name; each builds the model."""
