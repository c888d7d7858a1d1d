"""mlx-lm computes every accepted architecture as transformers does, and a model that it computes differently is refused
by the name of the setting.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from qatkit import QatkitError, export_model, prepare_qat, scheme
from qatkit.export.formats import FORMATS
from qatkit.export.mlx.architectures import ARCHITECTURES
from tests.export.mlx.test_format import batches

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
PHI3 = {"pad_token_id": 0, "eos_token_id": 0}
GEMMA3 = {"head_dim": 32, "sliding_window": 5, "query_pre_attn_scalar": 32}
WINDOWS = ["sliding_attention", "full_attention"]
ACCEPTED: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama, linear": lambda: LlamaConfig(**SHAPE, rope_parameters=LINEAR),
    "llama, llama3": lambda: LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=64, head_dim=32),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=32),
    "phi3": lambda: Phi3Config(**SHAPE, **PHI3),
    "gemma3_text": lambda: Gemma3TextConfig(**SHAPE, **GEMMA3, layer_types=WINDOWS),
    "gemma3_text, linear": lambda: Gemma3TextConfig(
        **SHAPE, **GEMMA3, layer_types=WINDOWS, rope_parameters={
            "full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}
        },
    ),
    "olmo2": lambda: Olmo2Config(**SHAPE, pad_token_id=0, eos_token_id=0),
    "granite": lambda: GraniteConfig(
        **SHAPE, embedding_multiplier=12.0, logits_scaling=6.0, residual_multiplier=0.22, attention_multiplier=0.0156
    ),
}  # fmt: skip


def built(config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases
                parameter += torch.randn_like(parameter) * 0.1
    return model


def test_every_architecture_is_tested() -> None:
    assert {name.split(",")[0] for name in ACCEPTED} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_architecture_is_accepted(name: str) -> None:
    FORMATS["mlx"].check_model(built(ACCEPTED[name]()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(**SHAPE, sliding_window=32), "'mistral' only without a sliding window.* sliding_window: 32 and"),
        (Phi3Config(**SHAPE, **PHI3, sliding_window=32), "'phi3' only without a sliding window"),
        (Qwen2Config(**SHAPE, use_sliding_window=True), "'qwen2' only with use_sliding_window: False, but .* True"),
        (Qwen3Config(**SHAPE, use_sliding_window=True), "'qwen3' only with use_sliding_window: False"),
        (Qwen3Config(**SHAPE, attention_bias=True), "'qwen3' only with attention_bias: False"),
        (LlamaConfig(**SHAPE, layer_types=WINDOWS), "'llama' only without layer_types other than 'full_attention'"),
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "'llama' only with hidden_act: 'silu', but the model has 'gelu'"),
        (LlamaConfig(**SHAPE, rope_parameters=YARN), "embeddings of type 'yarn' .*; use rope_type: default or linear"),
        (
            Phi3Config(**SHAPE, **PHI3, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
            "'phi3' only with partial_rotary_factor: 1.0, but the model has 0.5",
        ),
        (Qwen2Config(**SHAPE, head_dim=32), "'qwen2' only with head_dim: 16, but the model has 32"),
        (
            Gemma3TextConfig(**SHAPE, **GEMMA3, layer_types=["sliding_attention"] * 2),
            "'gemma3_text' only with full attention in every n-th layer, but the model has layer_types",
        ),
        (
            Gemma3TextConfig(**SHAPE | {"num_hidden_layers": 3}, **GEMMA3, layer_types=[*WINDOWS, "full_attention"]),
            "'gemma3_text' only with full attention in every n-th layer",
        ),
        (
            Gemma3TextConfig(**SHAPE | {"hidden_size": 128, "num_attention_heads": 4}, **GEMMA3, layer_types=WINDOWS),
            "embedding scale in bfloat16, which rounds the square root of hidden_size: 128",
        ),
        (
            Gemma3TextConfig(**SHAPE, **GEMMA3, layer_types=WINDOWS, final_logit_softcapping=30.0),
            "'gemma3_text' only with final_logit_softcapping: None",
        ),
    ],
)
def test_what_mlx_lm_computes_differently_is_refused_by_name(config: Any, message: str) -> None:
    with pytest.raises(QatkitError, match=rf"{message}.*use export: {{format: dense}}"):
        FORMATS["mlx"].check_model(built(config))


def test_an_embedding_with_float16_scales_is_refused_for_olmo2() -> None:
    model = built(ACCEPTED["olmo2"]())
    prepare_qat(model, layers={"model.embed_tokens": scheme("MLX4")})
    with pytest.raises(
        QatkitError, match=r"'model\.embed_tokens': with float16 scales .* computes 'olmo2' partly in float16"
    ):
        FORMATS["mlx"].check_model(model)


@pytest.mark.slow
@pytest.mark.skipif("QATKIT_MLX" not in os.environ, reason="QATKIT_MLX is not the interpreter of an MLX environment")
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ACCEPTED)
def test_mlx_lm_computes_every_accepted_architecture(name: str, quantized: bool, tmp_path: Path) -> None:
    model = built(ACCEPTED[name]())
    if quantized:
        # the embedding of a Gemma 3, which its output layer shares, cannot be quantized; that of an OLMo 2 is refused
        embeddings = [] if name.startswith(("gemma3", "olmo2")) else ["model.embed_tokens"]
        tied = ["lm_head"] if name.startswith("gemma3") else []
        prepare_qat(model, scheme("MLX4").weight, include=["*", *embeddings], exclude=tied)
    result = export_model(model, "mlx", tmp_path / "mlx", batches(), python=Path(os.environ["QATKIT_MLX"]))
    assert result.passed, result.failures
    assert result.not_run == ""
