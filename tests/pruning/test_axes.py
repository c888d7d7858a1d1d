"""The layout of Llama-like models: other families are refused by name, with the difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qatkit import QatkitError
from qatkit.pruning.axes import prefix_of

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
TWO_STACKS: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "OPTForCausalLM": (SIZES | {"ffn_dim": 48}, "has no 'model.decoder.layers.0.input_layernorm'"),
    "BartForConditionalGeneration": (TWO_STACKS, "has no 'model.encoder.layers.0.input_layernorm'"),
    "WhisperForConditionalGeneration": (
        TWO_STACKS | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
        "has no 'model.encoder.layers.0.input_layernorm'",
    ),
    "CLIPTextModel": (SIZES | {"bos_token_id": 0, "eos_token_id": 0}, "layers.0.input_layernorm'"),
    "CohereForCausalLM": (SIZES, "has no 'model.layers.0.post_attention_layernorm'"),
    "GPT2LMHeadModel": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, "has no layers.0.self_attn.q_proj"),
    "Gemma2ForCausalLM": (SIZES, "the axes of 'model.layers.0.pre_feedforward_layernorm.weight' are unknown"),
    "Qwen3MoeForCausalLM": (SIZES | {"num_experts": 2}, "has no 'model.layers.0.mlp.up_proj'"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_are_refused_with_the_difference_and_the_supported_ones(name: str) -> None:
    arguments, lacks = FAMILIES[name]
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class(**arguments))
    with pytest.raises(QatkitError, match=rf"{name} is not a Llama-like transformer: .*{lacks}") as caught:
        prefix_of(model)
    assert "supported models are Llama, Mistral, Qwen2" in str(caught.value)
    assert "layers_by: uniform" in str(caught.value)


def llama() -> Any:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SIZES))


def test_a_llama_that_differs_from_its_config_is_refused_with_the_difference() -> None:
    assert prefix_of(llama()) == "model."
    odd = llama()
    odd.model.layers[1].mlp.gate_scale = nn.Linear(2, 2)
    with pytest.raises(QatkitError, match=r"the axes of 'model.layers.1.mlp.gate_scale.weight' are unknown"):
        prefix_of(odd)
    wide = llama()
    wide.model.layers[1].self_attn.q_proj = nn.Linear(32, 64, bias=False)  # as gated attention has it
    with pytest.raises(QatkitError, match=r"1.self_attn.q_proj.weight' has shape \[64, 32\], .* \[32, 32\]"):
        prefix_of(wide)
    short = llama()
    del short.model.layers[0]
    with pytest.raises(QatkitError, match="the model has 1 layers, but the config specifies 2"):
        prefix_of(short)
    silent = llama()
    del silent.config.num_key_value_heads
    with pytest.raises(QatkitError, match="the config has no integer num_key_value_heads"):
        prefix_of(silent)
    with pytest.raises(QatkitError, match="Linear is not a Llama-like transformer: the model has no config"):
        prefix_of(nn.Linear(2, 2))
