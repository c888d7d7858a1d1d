"""Small transformers with random weights, one for every kind of block that PTQ methods know."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from qatkit import QuantSpec

_SIZE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
_OPT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32,
}  # fmt: skip
_BERT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_SIZE),
    "llama_gqa": LlamaConfig(**_SIZE | {"num_key_value_heads": 2}),
    "mistral": MistralConfig(**_SIZE, sliding_window=8),
    "qwen2": Qwen2Config(**_SIZE),
    "qwen3": Qwen3Config(**_SIZE),
    "gemma": GemmaConfig(**_SIZE),
    "gemma2": Gemma2Config(**_SIZE),
    "gemma3": Gemma3TextConfig(**_SIZE, sliding_window=8),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": OPTConfig(**_OPT),
    "opt_norm_after": OPTConfig(**_OPT, do_layer_norm_before=False),
    "opt_gelu": OPTConfig(**_OPT, activation_function="gelu"),
    "bert": BertConfig(**_BERT),
    "bert_relu": BertConfig(**_BERT, hidden_act="relu"),
}


def tiny(name: str) -> Any:
    """A model whose weights, norms and biases are all away from their defaults, in eval mode."""
    config = CONFIGS[name]
    kind = AutoModel if isinstance(config, BertConfig) else AutoModelForCausalLM
    model = kind.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.5 if parameter.dim() == 1 else 0.0, std=0.3)
    return model


def tokens(seed: int = 0, rows: int = 4, length: int = 24) -> torch.Tensor:
    """Token ids, ``[rows, length]``."""
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def output(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Logits, or the last hidden state of a model without a head."""
    with torch.no_grad():
        result: torch.Tensor = model(batch)[0]
    return result


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 4),
    ).eval()


W3 = QuantSpec(3, observer="mse", strategy="group", group_size=16)
W3_CHANNEL = QuantSpec(3, observer="lsq")
A8 = QuantSpec(8, symmetric=False, strategy="tensor")
DATA = [tokens(seed) for seed in range(4)]
