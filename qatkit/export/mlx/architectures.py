"""The transformers models that mlx-lm computes in the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from qatkit.common.tables import Table
from qatkit.errors import QatkitError

INSTEAD = "use export: {format: dense}"
ROPE_TYPES = ("default", "linear", "llama3")
"""Types of rotary embeddings that mlx-lm computes in the same way."""


@dataclass(frozen=True)
class Architecture:
    """A transformers model whose files were compared in mlx-lm."""

    name: str
    """``model_type`` of the config."""
    settings: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    """Settings that mlx-lm's implementation assumes, by attribute of the config."""
    problem: Callable[[nn.Module, Any], str] = lambda model, config: ""
    """``(model, config)``: return what mlx-lm requires, if `settings` cannot express it and the model differs."""
    rope_types: tuple[str, ...] = ROPE_TYPES


def _window(model: nn.Module, config: Any) -> str:
    """mlx-lm attends to the whole text."""
    window, longest = getattr(config, "sliding_window", None), config.max_position_embeddings
    if window is None or window >= longest:
        return ""
    return (
        f"without a sliding window, but the model has sliding_window: {window} and max_position_embeddings: {longest} "
        "(if no text is longer than the window, set sliding_window: null in its config.json)"
    )


def _head_width(model: nn.Module, config: Any) -> str:
    """mlx-lm computes the width of a head from other settings."""
    width, own = config.hidden_size // config.num_attention_heads, getattr(config, "head_dim", None)
    return "" if own in (None, width) else f"with head_dim: {width}, but the model has {own}"


def _layer_types(model: nn.Module, config: Any) -> str:
    """transformers ignores this key of a Llama, but mlx-lm does not."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return "without layer_types other than 'full_attention'" if kinds - {"full_attention"} else ""


def _mistral(model: nn.Module, config: Any) -> str:
    return _layer_types(model, config) or _window(model, config)


def _phi3(model: nn.Module, config: Any) -> str:
    return _head_width(model, config) or _window(model, config)


def _gemma3(model: nn.Module, config: Any) -> str:
    if sliding_window_pattern(config) is None:
        return f"with full attention in every n-th layer, but the model has layer_types: {list(config.layer_types)}"
    local = config.rope_parameters["sliding_attention"]
    if local.get("rope_type", "default") != "default":
        return f"with default rotary embeddings in sliding windows, but the model has '{local['rope_type']}'"
    scale = torch.tensor(config.hidden_size**0.5)
    dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]  # of transformers
    if dtype != torch.bfloat16 and scale.bfloat16() != scale:
        return (
            f"with an embedding scale in bfloat16, which rounds the square root of hidden_size: {config.hidden_size} "
            f"to {scale.bfloat16():g}"
        )
    return ""


def sliding_window_pattern(config: Any) -> int | None:
    """Return n if every n-th layer of a Gemma 3, and no other, has full attention; otherwise None.

    Example:
        >>> from types import SimpleNamespace
        >>> sliding_window_pattern(SimpleNamespace(layer_types=["sliding_attention", "full_attention"] * 2))
        2
    """
    full = [index for index, kind in enumerate(config.layer_types) if kind == "full_attention"]
    every = full[0] + 1 if full else 0
    return every if every and full == list(range(every - 1, len(config.layer_types), every)) else None


_FULL = {"hidden_act": "silu", "use_sliding_window": False}

ARCHITECTURES = Table(
    "MLX architecture",
    [
        Architecture("llama", problem=_layer_types),
        Architecture("mistral", problem=_mistral),
        Architecture("qwen2", _FULL, _head_width),
        Architecture("qwen3", _FULL | {"attention_bias": False}),
        Architecture("phi3", problem=_phi3, rope_types=("default",)),
        Architecture(
            "gemma3_text",
            {
                "hidden_activation": "gelu_pytorch_tanh",
                "attention_bias": False,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "use_bidirectional_attention": False,
            },
            _gemma3,
        ),
        Architecture("olmo2"),
        Architecture("granite", problem=_head_width),
    ],
)
"""Every supported architecture by the ``model_type`` of its config."""


def check_architecture(model: nn.Module) -> None:
    """Raise an error if mlx-lm does not compute a model as transformers does.

    Raises:
        QatkitError: the model is not supported, or mlx-lm ignores a setting of its config or computes it differently.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in ARCHITECTURES or not type(model).__name__.endswith("ForCausalLM"):
        raise QatkitError(
            f"'mlx' does not support the model {type(model).__name__} ('{kind}')",
            advice=f"use a language model of type {', '.join(ARCHITECTURES)}, or {INSTEAD}",
        )
    row = ARCHITECTURES[kind]
    for name, needed in row.settings.items():
        if (value := getattr(config, name, needed)) != needed:
            raise QatkitError(
                f"mlx-lm implements '{kind}' only with {name}: {needed!r}, but the model has {value!r}", advice=INSTEAD
            )
    if problem := row.problem(model, config):
        raise QatkitError(f"mlx-lm implements '{kind}' only {problem}", advice=INSTEAD)
    _check_rope(row, config)


def check_float16_embedding(name: str, model: nn.Module) -> None:
    """Raise an error if mlx-lm multiplies in float16 after an embedding whose output is float16.

    Raises:
        QatkitError: the model is an OLMo 2, which has no norm with float32 weights before its first matrix product.
    """
    kind = cast(Any, model).config.model_type
    if kind == "olmo2":
        raise QatkitError(
            f"layer '{name}': with float16 scales in the embedding, mlx-lm computes '{kind}' partly in float16",
            advice="exclude the layer",
        )


def _check_rope(row: Architecture, config: Any) -> None:
    found = getattr(config, "rope_parameters", None) or {}
    rope = found.get("full_attention", found)
    kind, rotated = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind not in row.rope_types:
        raise QatkitError(
            f"mlx-lm does not compute rotary embeddings of type '{kind}' as transformers does in '{row.name}'",
            advice=f"use rope_type: {' or '.join(row.rope_types)}, or {INSTEAD}",
        )
    if rotated != 1.0:
        raise QatkitError(
            f"mlx-lm implements '{row.name}' only with partial_rotary_factor: 1.0, but the model has {rotated}",
            advice=INSTEAD,
        )
