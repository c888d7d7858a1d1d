"""What a language model takes in memory while it answers: weights in a scheme, their scales, and keys and values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from qatkit.errors import QatkitError
from qatkit.quantization.experts import expert_weights, is_experts
from qatkit.schemes import scheme
from qatkit.spec import QuantSpec

SCHEMES = ("BF16", "W8A8", "FP8_DYNAMIC", "W4A16", "W2A16")
"""What is compared: 16 bits, and schemes that compressed-tensors holds."""
HALF = 2
"""Bytes of a number in 16 bits: what is not quantized, and keys and values."""


@dataclass(frozen=True)
class ServingMemory:
    """Bytes on one device while a model answers."""

    scheme: str
    weights: int
    """Codes, scales and what stays in 16 bits."""
    cache: int
    """Keys and values of every token of every sequence."""

    @property
    def total(self) -> int:
        return self.weights + self.cache


def serving_memory(model: nn.Module, context: int, batch: int, kv_bits: int = 16) -> list[ServingMemory]:
    """Predict what serving takes under each of the `SCHEMES`: linear layers and experts quantized, no output layer.

    Weights that are not quantized and scales are in 16 bits. What comes and goes within a layer is left out: it is
    small beside these, and the runtime decides it.

    Args:
        model: A causal language model of transformers; the meta device will do.
        context: Tokens of a sequence, prompt and answer.
        batch: Sequences at once.
        kv_bits: Bits of a key's or value's number.

    Raises:
        QatkitError: the model's config does not say what attention keeps.

    Example:
        >>> import torch
        >>> from qatkit.models import llama
        >>> with torch.device("meta"):
        ...     model = llama(vocab_size=1000, hidden=256, layers=2, heads=4, kv_heads=2)
        >>> found = serving_memory(model, context=1024, batch=8)[0]
        >>> found.cache == 2 * 2 * 2 * 64 * 1024 * 8 * 2
        True
    """
    cache = _cached_numbers(model) * context * batch * kv_bits // 8
    return [ServingMemory(name, weight_bytes(model, name), cache) for name in SCHEMES]


def weight_bytes(model: nn.Module, name: str) -> int:
    """Bytes of a model's weights and scales in a scheme, as a compressed-tensors folder holds them in 16 bits."""
    total = {id(parameter): parameter.numel() * HALF for parameter in model.parameters()}
    spec = scheme(name).weight if name != "BF16" else None
    if spec is not None:
        for parameter, inputs in _quantizable(model):
            codes = parameter.numel() * spec.num_bits // 8
            total[id(parameter)] = codes + _scales(parameter.numel(), inputs, spec) * HALF
    return sum(total.values())


def _quantizable(model: nn.Module) -> Iterable[tuple[Any, int]]:
    """Weights of linear layers and experts, and the inputs of each output."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        if type(module) is nn.Linear and module is not head:
            yield module.weight, module.in_features
        elif type(module).__name__ == "Conv1D":
            weight: Any = module.weight  # GPT-2's, [in, out]
            yield weight, weight.shape[0]
        elif is_experts(module):
            for _, experts in expert_weights(module):
                yield experts, experts.shape[1 if module.is_transposed else 2]


def _scales(numbers: int, inputs: int, spec: QuantSpec) -> int:
    return -(-numbers // (spec.group_size or inputs))


def _cached_numbers(model: nn.Module) -> int:
    """Keys and values of one token, in all layers."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if layers is None or heads is None:
        raise QatkitError(
            f"model: {type(model).__name__} has no config that says how many layers and heads it has, so the memory of "
            "its keys and values is not known; give a language model of transformers"
        )
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * width)
