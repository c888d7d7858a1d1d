"""Smaller transformers: layers, attention heads, MLP neurons and hidden channels are cut out of a Llama-like model.

First come the scores (`importance`), then the cut (`shrink`). What comes out is a plain model of the same class with a
corrected config, which `from_pretrained` loads wherever transformers is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.common.layer_configs import shorten
from qatkit.errors import QatkitError
from qatkit.pruning.axes import axes_of, build_like, head_dim_of, prefix_of


@dataclass(frozen=True)
class Shape:
    """The size to shrink to; None leaves a dimension as it is.

    Args:
        layers: Number of blocks.
        hidden: Width of the residual stream.
        neurons: Width of the MLP.
        heads: Query heads in all; a multiple of the key-value heads.
        groups: Key-value heads; a query goes with the head it reads, so that grouped-query attention stays what it is.
    """

    layers: int | None = None
    hidden: int | None = None
    neurons: int | None = None
    heads: int | None = None
    groups: int | None = None


@dataclass(frozen=True)
class Importance:
    """Scores of what can be cut out; the lowest goes first."""

    layers: Tensor
    """``[layers]``: how far a block turns the residual stream."""
    hidden: Tensor
    """``[hidden]``"""
    neurons: Tensor
    """``[layers, neurons]``"""
    heads: Tensor
    """``[layers, heads]``"""


def importance(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], object] | None = None) -> Importance:
    """Score every part by what passes through it on a few batches.

    Muralidharan et al. (2024, https://arxiv.org/abs/2407.14679), section 2.2: mean magnitudes of neurons and of normed
    hidden channels, norms of head outputs, and for blocks one less the cosine of what comes in and what goes out.

    Args:
        model: A Llama-like model of transformers (Llama, Mistral, Qwen2, Qwen3, Granite, SmolLM3).
        batches: What `forward` takes.
        forward: Runs the model on one batch; `model(batch)` by default.

    Raises:
        QatkitError: the model is no such model, or there are no batches.
    """
    prefix = prefix_of(model)
    config: Any = model.config
    count, heads = config.num_hidden_layers, config.num_attention_heads
    device = next(model.parameters()).device
    sums = {
        "layers": torch.zeros(count, device=device),
        "hidden": torch.zeros(config.hidden_size, device=device),
        "neurons": torch.zeros(count, config.intermediate_size, device=device),
        "heads": torch.zeros(count, heads, device=device),
    }

    def hooks(index: int) -> list[Any]:
        block = model.get_submodule(f"{prefix}layers.{index}")

        def turn(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            before, after = inputs[0].float(), (output[0] if isinstance(output, tuple) else output).float()
            sums["layers"][index] += 1 - torch.cosine_similarity(before, after, dim=-1).mean()

        def neurons(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums["neurons"][index] += inputs[0].float().abs().flatten(0, -2).mean(dim=0)

        def outputs(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums["heads"][index] += _head_norms(inputs[0], heads)

        def channels(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            sums["hidden"] += output.float().abs().flatten(0, -2).mean(dim=0)

        return [
            block.register_forward_hook(turn),
            block.get_submodule("mlp.down_proj").register_forward_pre_hook(neurons),
            block.get_submodule("self_attn.o_proj").register_forward_pre_hook(outputs),
            block.get_submodule("input_layernorm").register_forward_hook(channels),
            block.get_submodule("post_attention_layernorm").register_forward_hook(channels),
        ]

    handles = [handle for index in range(count) for handle in hooks(index)]
    modes, seen = [(module, module.training) for module in model.modules()], 0
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                (forward or model)(batch)
                seen += 1
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    if not seen:
        raise QatkitError("importance: there are no batches; pass a few that the model was trained on")
    return Importance(**sums)


def shrink(model: nn.Module, scores: Importance, shape: Shape) -> nn.Module:
    """A smaller model of the same class, with the parts of highest scores; the old one stays as it is.

    Args:
        model: A Llama-like model of transformers.
        scores: From `importance`.
        shape: The size of the new one.

    Returns:
        The new model, with a config that says what it is.

    Raises:
        QatkitError: the model is no such model, or a size is larger than it was, does not fit the others or cannot be
            said by the model's config.
    """
    prefix = prefix_of(model)
    config: Any = copy.deepcopy(model.config)
    head_dim = head_dim_of(config)
    old = Shape(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    new = _checked(old, shape)
    layers = _best(scores.layers, new["layers"]).tolist()
    hidden = _best(scores.hidden, new["hidden"])
    state: dict[str, Tensor] = {}
    picks: dict[str, Tensor | None] = {"whole": None, "hidden": hidden}
    for position, index in enumerate(layers):
        queries, groups = _heads(scores.heads[index], new["heads"], old.groups or 1, new["groups"])
        inside: dict[str, Tensor | None] = picks | {
            "neuron": _best(scores.neurons[index], new["neurons"]),
            "head": _spread(queries, head_dim),
            "group": _spread(groups, head_dim),
        }
        for name, value in model.get_submodule(f"{prefix}layers.{index}").state_dict().items():
            axes = axes_of(prefix, f"{prefix}layers.{index}.{name}")
            state[f"{prefix}layers.{position}.{name}"] = _cut(value, axes, inside)
    for name, value in model.state_dict().items():
        if not name.startswith(f"{prefix}layers."):
            state[name] = _cut(value, axes_of(prefix, name), picks)
    shorten(config, config.num_hidden_layers, layers)
    config.hidden_size, config.intermediate_size, config.head_dim = len(hidden), new["neurons"], head_dim
    config.num_attention_heads, config.num_key_value_heads = new["heads"], new["groups"]
    smaller: Any = build_like(model, config, state)
    smaller.to(next(model.parameters()).device)
    # assigned, each in its own dtype: a cast of the whole model would round the rotary frequencies too
    smaller.load_state_dict(state, strict=True, assign=True)
    smaller.tie_weights()
    smaller.train(model.training)
    assert isinstance(smaller, nn.Module)
    return smaller


def _head_norms(x: Tensor, heads: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x.float().reshape(-1, heads, x.shape[-1] // heads), dim=-1)
    return norms.mean(dim=0)


def _checked(old: Shape, shape: Shape) -> dict[str, int]:
    sizes = {}
    for key, before in vars(old).items():
        wanted = vars(shape)[key]
        sizes[key] = before if wanted is None else wanted
        if not 1 <= sizes[key] <= before:
            raise QatkitError(f"shape.{key}: {sizes[key]} is out of range; write a number from 1 to {before}")
    if shape.heads is None:
        sizes["heads"] = sizes["groups"] * ((old.heads or 1) // (old.groups or 1))
    per_group = (old.heads or 1) // (old.groups or 1)
    if sizes["heads"] % sizes["groups"] or sizes["heads"] // sizes["groups"] > per_group:
        raise QatkitError(
            f"shape.heads: {sizes['heads']} query heads do not go with {sizes['groups']} key-value heads, "
            f"each of which serves {per_group} of them at most; write a multiple of {sizes['groups']} up to "
            f"{sizes['groups'] * per_group}"
        )
    return sizes


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the highest scores, in their order; of equal ones those that come last."""
    return scores.sort(stable=True).indices[len(scores) - count :].sort().values


def _heads(scores: Tensor, heads: int, old_groups: int, groups: int) -> tuple[Tensor, Tensor]:
    """The query heads and key-value heads that stay: the best groups, and within each the same number of queries."""
    by_group = scores.view(old_groups, -1)
    kept = _best(by_group.sum(dim=1), groups)
    queries = [group * by_group.shape[1] + _best(by_group[group], heads // groups) for group in kept]
    return torch.cat(queries), kept


def _spread(heads: Tensor, head_dim: int) -> Tensor:
    return (heads.unsqueeze(1) * head_dim + torch.arange(head_dim, device=heads.device)).flatten()


def _cut(value: Tensor, axes: tuple[str, ...], picks: Mapping[str, Tensor | None]) -> Tensor:
    for dimension, axis in enumerate(axes[: value.dim()]):
        pick = picks[axis]
        if pick is not None:
            value = value.index_select(dimension, pick.to(value.device))
    return value.clone()
