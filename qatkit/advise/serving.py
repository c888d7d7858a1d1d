"""Predict memory use for serving a language model: quantized weights, scales and KV cache."""

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
"""The compared schemes: 16 bits, and compressed-tensors schemes."""
HALF = 2
"""Bytes of a 16-bit number, used for unquantized weights, scales and the KV cache."""


@dataclass(frozen=True)
class ServingMemory:
    """Bytes on one device during serving."""

    scheme: str
    weights: int
    """Codes, scales and 16-bit weights."""
    cache: int
    """The KV cache of all sequences."""

    @property
    def total(self) -> int:
        return self.weights + self.cache


def serving_memory(model: nn.Module, context: int, batch: int, kv_bits: int = 16) -> list[ServingMemory]:
    """Predict memory use for serving with each scheme in `SCHEMES`.

    Linear layers and experts are quantized; the output layer is not. Scales and unquantized weights have 16 bits.
    Temporary activations are not included: they are comparatively small and depend on the runtime.

    Args:
        model: A transformers causal language model; it may be on the meta device.
        context: Tokens per sequence, including prompt and completion.
        batch: Number of concurrent sequences.
        kv_bits: Bits per element of the KV cache.

    Raises:
        QatkitError: the model's config lacks the number of layers or heads.

    Example:
        >>> import torch
        >>> from qatkit.models import llama
        >>> with torch.device("meta"):
        ...     model = llama(vocab_size=1000, hidden=256, layers=2, heads=4, kv_heads=2)
        >>> memory = serving_memory(model, context=1024, batch=8)[0]
        >>> memory.cache == 2 * 2 * 2 * 64 * 1024 * 8 * 2
        True
    """
    cache = cached_numbers(model) * context * batch * kv_bits // 8
    return [ServingMemory(name, weight_bytes(model, name), cache) for name in SCHEMES]


def weight_bytes(model: nn.Module, name: str) -> int:
    """Return the bytes of a model's weights and scales in a scheme, as in a 16-bit compressed-tensors folder."""
    total = {id(parameter): parameter.numel() * HALF for parameter in model.parameters()}
    spec = scheme(name).weight if name != "BF16" else None
    if spec is not None:
        for parameter, inputs in _quantizable(model):
            codes = int(parameter.numel() * spec.stored_bits) // 8
            total[id(parameter)] = codes + _scales(parameter.numel(), inputs, spec) * HALF
    return sum(total.values())


def _quantizable(model: nn.Module) -> Iterable[tuple[Any, int]]:
    """Weights of linear layers and experts, each with its number of inputs per output."""
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


def cached_numbers(model: nn.Module) -> int:
    """Elements of keys and values per token, over all layers."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if layers is None or heads is None:
        raise QatkitError(
            f"{type(model).__name__} has no config with the number of layers and heads, so the size of its KV "
            "cache is unknown",
            key="model",
            advice="use a transformers language model",
        )
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * width)
