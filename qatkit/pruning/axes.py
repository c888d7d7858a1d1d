"""The layout of a Llama-like transformer: the axes of its parameters, and a check that a model has this layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError

KNOWN = "Llama, Mistral, Qwen2, Qwen3, Granite, SmolLM3 and models with the same layers"
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
"""Sizes that a config must have."""
BLOCK = {
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "self_attn.q_proj": ("head", "hidden"),
    "self_attn.k_proj": ("group", "hidden"),
    "self_attn.v_proj": ("group", "hidden"),
    "self_attn.o_proj": ("hidden", "head"),
    "self_attn.q_norm": ("whole",),
    "self_attn.k_norm": ("whole",),
    "mlp.gate_proj": ("neuron", "hidden"),
    "mlp.up_proj": ("neuron", "hidden"),
    "mlp.down_proj": ("hidden", "neuron"),
}
"""Axes of the parameters of one layer; "head" is heads * head_dim, and "group" is kv_heads * head_dim."""
OPTIONAL = ("self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj")
"""Optional parameters of a layer, at which importance is never measured."""
SHARED = {"embed_tokens": ("whole", "hidden"), "norm": ("hidden",)}
"""Axes of the parameters outside the layers."""
HEADS = {"lm_head": ("whole", "hidden"), "score": ("whole", "hidden")}
"""Axes of the output layer of a language model and of a classifier; their names have no prefix."""


def prefix_of(model: nn.Module) -> str:
    """Return the prefix of the parameter names before ``layers.0``, such as ``model.``.

    Raises:
        QatkitError: the model is not Llama-like, or its sizes do not match its config.
    """
    first = "layers.0.self_attn.q_proj"
    prefix = next((name.removesuffix(first) for name, _ in model.named_modules() if name.endswith(first)), "")
    if difference := _difference(model, prefix):
        raise QatkitError(
            f"{type(model).__name__} is not a Llama-like transformer: {difference}; supported models are {KNOWN}",
            key="model",
            advice="remove whole layers instead (set layers: 2 and layers_by: uniform, or keep_layers)",
        )
    return prefix


def axes_of(prefix: str, name: str) -> tuple[str, ...]:
    """Return the axes of a weight or bias; empty if they are unknown."""
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return ()
    if inside := re.match(rf"{re.escape(prefix)}layers\.\d+\.(.+)", module):
        return BLOCK.get(inside[1], ())
    return HEADS.get(module) or SHARED.get(module.removeprefix(prefix), ())


def _difference(model: nn.Module, prefix: str) -> str | None:
    """Describe how a model differs from the known layout; None if it does not."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return "the model has no config"
    modules, stack = dict(model.named_modules()), f"{prefix}layers"
    layers = list(modules[stack].children()) if stack in modules else []
    if not layers:
        return "the model has no layers.0.self_attn.q_proj"
    for index in range(len(layers)):
        for name in BLOCK:
            if name not in OPTIONAL and f"{stack}.{index}.{name}" not in modules:
                return f"the model has no '{stack}.{index}.{name}'"
    state = model.state_dict()
    for name in state:
        if not axes_of(prefix, name):
            return f"the axes of '{name}' are unknown"
    for key in SIZES:
        if not isinstance(getattr(config, key, None), int):
            return f"the config has no integer {key}"
    if len(layers) != config.num_hidden_layers:
        return f"the model has {len(layers)} layers, but the config specifies {config.num_hidden_layers}"
    head_dim = head_dim_of(config)
    sizes = {
        "hidden": config.hidden_size,
        "neuron": config.intermediate_size,
        "head": config.num_attention_heads * head_dim,
        "group": config.num_key_value_heads * head_dim,
    }
    for name, value in state.items():
        wanted = [sizes.get(axis, size) for axis, size in zip(axes_of(prefix, name), value.shape, strict=False)]
        if wanted != list(value.shape):
            return f"'{name}' has shape {list(value.shape)}, but the config specifies {wanted}"
    return None


def head_dim_of(config: Any) -> int:
    """Return the width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def build_like(model: nn.Module, config: Any, weights: Mapping[str, Tensor]) -> nn.Module:
    """Build a model of the same class with a different config and random weights.

    Args:
        model: A transformers model.
        config: The config with the new sizes.
        weights: Tensors by name; the new model must have a parameter for each.

    Raises:
        QatkitError: the class cannot be built from the config, or its weights have different shapes.
    """
    kind, before = type(model), vars(model.config)
    changed = {key: size for key, size in vars(config).items() if isinstance(size, int) and before.get(key) != size}
    try:
        with torch.random.fork_rng(devices=[]):
            built: nn.Module = kind(config)
    except Exception as error:  # third-party code may raise anything
        raise _unsupported(kind, changed, f"cannot be built ({type(error).__name__}: {str(error)[:200]})") from error
    shapes, wanted = ({key: list(w.shape) for key, w in part.items()} for part in (built.state_dict(), weights))
    for key in wanted | shapes:
        if shapes.get(key) != wanted.get(key):
            raise _unsupported(kind, changed, f"has '{key}' of shape {shapes.get(key)} instead of {wanted.get(key)}")
    return built


def _unsupported(kind: type, changed: Mapping[str, Any], problem: str) -> QatkitError:
    return QatkitError(
        f"{kind.__name__} with {changed} {problem}, so its config cannot express these sizes",
        key="model",
        advice="shrink other parts, such as neurons or whole layers",
    )
