"""Small models of transformers whose layers are quantized, and what they are compared with."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from qatkit import (
    QuantSpec,
    fake_quantize,
)
from qatkit.quantization.estimators import computed_qparams

W4 = QuantSpec(num_bits=4)
A8 = QuantSpec(symmetric=False, strategy="tensor")
TOKEN = QuantSpec(strategy="token")
Model = transformers.PreTrainedModel
TOKENS = torch.arange(24).view(2, 12)


def rounded(weight: Tensor, spec: QuantSpec = W4) -> Tensor:
    return fake_quantize(weight, *computed_qparams(weight, spec), spec)


def llama(**changes: Any) -> Model:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False, **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> Model:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()


def mixtral() -> Model:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, use_cache=False,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()
