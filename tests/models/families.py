"""Tiny models with random weights in the shapes of families of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = SHAPE | {"num_key_value_heads": 1}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=16),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=8),
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    ),
    "bert": lambda: transformers.BertConfig(
        **SHAPE | {"pad_token_id": 0}, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ),
}  # fmt: skip
CAUSAL = ["llama", "qwen3", "gemma", "gemma3", "mixtral", "gpt2"]


def tiny(family: str, kind: str = "CausalLM", **config: Any) -> nn.Module:
    """A model of a family, such as ``tiny("bert", "MaskedLM")``."""
    torch.manual_seed(0)
    settings = CONFIGS[family]()
    for name, value in config.items():
        setattr(settings, name, value)
    settings.use_cache = False
    factory = getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")
    model: nn.Module = factory.from_config(settings)
    return model
