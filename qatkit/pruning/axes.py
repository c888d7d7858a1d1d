"""The map of a Llama-like transformer: the axes of its parameters, and whether a model is one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError

KNOWN = "Llama, Mistral, Qwen2, Qwen3, Granite, SmolLM3 and what has the same blocks"
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
"""What a config must say."""
# the axes of every parameter; "head" is heads * head_dim and "group" key-value heads * head_dim
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
OPTIONAL = ("self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj")
"""Without the others a block is no such block: what they do is scored."""
AROUND = {"embed_tokens": ("whole", "hidden"), "norm": ("hidden",)}
HEADS = {"lm_head": ("whole", "hidden"), "score": ("whole", "hidden")}
"""Of a language model and of a classifier; no prefix stands before them."""


def prefix_of(model: nn.Module) -> str:
    """What stands before ``layers.0``.

    Raises:
        QatkitError: the model has not the blocks that are known here, each with the sizes that its config says.
    """
    first = "layers.0.self_attn.q_proj"
    prefix = next((name.removesuffix(first) for name, _ in model.named_modules() if name.endswith(first)), "")
    if unlike := _unlike(model, prefix):
        raise QatkitError(
            f"model: {type(model).__name__} is no Llama-like model of transformers: {unlike}. Structured pruning knows "
            f"{KNOWN}; of others whole layers can be dropped by their place (layers: 2 with layers_by: uniform, or "
            "keep_layers), but a config such as BERT's cannot say that heads are missing"
        )
    return prefix


def axes_of(prefix: str, name: str) -> tuple[str, ...]:
    """The axes of a weight or bias; none where they are not known."""
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return ()
    if inside := re.match(rf"{re.escape(prefix)}layers\.\d+\.(.+)", module):
        return BLOCK.get(inside[1], ())
    return HEADS.get(module) or AROUND.get(module.removeprefix(prefix), ())


def _unlike(model: nn.Module, prefix: str) -> str | None:
    """Why a model cannot be cut by what is known here."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return "it has no config"
    modules, stack = dict(model.named_modules()), f"{prefix}layers"
    layers = list(modules[stack].children()) if stack in modules else []
    if not layers:
        return "it has no layers.0.self_attn.q_proj"
    for index in range(len(layers)):
        for name in BLOCK:
            if name not in OPTIONAL and f"{stack}.{index}.{name}" not in modules:
                return f"it has no '{stack}.{index}.{name}'"
    state = model.state_dict()
    for name in state:
        if not axes_of(prefix, name):
            return f"the axes of its '{name}' are not known"
    for key in SIZES:
        if not isinstance(getattr(config, key, None), int):
            return f"its config gives no number as {key}"
    if len(layers) != config.num_hidden_layers:
        return f"it has {len(layers)} layers and its config counts {config.num_hidden_layers}"
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
            return f"its '{name}' is of shape {list(value.shape)} where its config says {wanted}"
    return None


def head_dim_of(config: Any) -> int:
    """The width of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def build_like(model: nn.Module, config: Any, weights: Mapping[str, Tensor]) -> nn.Module:
    """A model of the same class with another config and random weights.

    Args:
        model: One of transformers.
        config: Says the new sizes.
        weights: Those that the new model must have room for, by name.

    Raises:
        QatkitError: the class cannot be built so, or its weights would have other shapes.
    """
    kind, before = type(model), vars(model.config)
    changed = {key: size for key, size in vars(config).items() if isinstance(size, int) and before.get(key) != size}
    try:
        with torch.random.fork_rng(devices=[]):
            built: nn.Module = kind(config)
    except Exception as error:  # foreign code may raise anything
        said = f"cannot be built ({type(error).__name__}: {str(error)[:200]})"
        raise QatkitError(_cannot_say(kind, changed, said)) from error
    found, wanted = ({key: list(w.shape) for key, w in part.items()} for part in (built.state_dict(), weights))
    for key in wanted | found:
        if found.get(key) != wanted.get(key):
            said = f"has '{key}' of shape {found.get(key)} where {wanted.get(key)} is left"
            raise QatkitError(_cannot_say(kind, changed, said))
    return built


def _cannot_say(kind: type, changed: Mapping[str, Any], said: str) -> str:
    return (
        f"model: {kind.__name__} with {changed} {said}: its config cannot say what would be left; cut something "
        "else, as a rule neurons or other layers"
    )
