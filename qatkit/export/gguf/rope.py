"""Rotary position embeddings in GGUF: the base frequency, and scaling for longer contexts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qatkit.errors import QatkitError

SUPPORTED = ("default", "linear", "llama3")
"""Types of rotary embeddings that llama.cpp computes in the same way."""
_LOCAL_BASE = 10000.0
"""The base frequency of layers with sliding windows, which is fixed in llama.cpp."""


def _parameters(config: Any) -> dict[str, Any]:
    """The parameters of layers with full attention; empty without rotary embeddings."""
    found: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    full: dict[str, Any] = found.get("full_attention", found)
    return full


def check_rope(config: Any, instead: str) -> None:
    """Raise an error for rotary embeddings that llama.cpp does not compute in the same way.

    Args:
        config: A transformers config.
        instead: Advice.

    Raises:
        QatkitError: the type of rotary embeddings is not supported.
    """
    kind = _parameters(config).get("rope_type", "default")
    if kind not in SUPPORTED:
        raise QatkitError(f"'gguf' does not support rotary embeddings of type '{kind}'", advice=instead)
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if local is not None and (local.get("rope_type", "default"), local["rope_theta"]) != ("default", _LOCAL_BASE):
        raise QatkitError(
            f"llama.cpp uses rope_theta: {_LOCAL_BASE} in layers with sliding windows, but the model has "
            f"{local['rope_theta']} ({local.get('rope_type', 'default')})",
            advice=instead,
        )


def rope_metadata(config: Any, head_width: int) -> dict[str, Any]:
    """Return the metadata of rotary embeddings and of the head width, by key without the architecture's prefix."""
    parameters = _parameters(config)
    if not parameters:
        return {}
    values: dict[str, Any] = {
        "attention.key_length": head_width,
        "attention.value_length": head_width,
        "rope.dimension_count": int(head_width * parameters.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(parameters["rope_theta"]),
    }
    if parameters.get("rope_type") == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}
    return values


def rope_factors(config: Any) -> Tensor | None:
    """Return Llama 3.1's frequency divisors, float32, which the file stores as a tensor; None for other models.

    Example:
        >>> from transformers import LlamaConfig
        >>> rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        ...         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        >>> factors = rope_factors(LlamaConfig(head_dim=128, rope_parameters=rope))
        >>> factors.shape, factors[0].item(), factors[-1].item()
        (torch.Size([64]), 1.0, 8.0)
    """
    parameters = _parameters(config)
    if parameters.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, 2 * len(scaled), 2, dtype=torch.int64).float() / (2 * len(scaled))
    plain: Tensor = 1.0 / (parameters["rope_theta"] ** steps)
    return plain / scaled
