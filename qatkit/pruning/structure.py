"""Structured pruning of Llama-like transformers: layers, attention heads, MLP neurons and hidden channels.

`importance` computes scores, and `shrink` removes the parts with the lowest scores. The result is a plain model of the
same class with an adapted config, and `from_pretrained` can load it.
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
    """The sizes of a shrunk model; None leaves a dimension unchanged.

    Args:
        layers: Number of layers.
        hidden: Width of the residual stream.
        neurons: Width of the MLP.
        heads: Total number of query heads, a multiple of the number of key-value heads.
        kv_heads: Number of key-value heads. A query head stays with its key-value head, which preserves grouped-query
            attention.
    """

    layers: int | None = None
    hidden: int | None = None
    neurons: int | None = None
    heads: int | None = None
    kv_heads: int | None = None


@dataclass(frozen=True)
class Importance:
    """Scores of the parts of a model; parts with the lowest scores are removed first."""

    layers: Tensor
    """``[layers]``"""
    hidden: Tensor
    """``[hidden]``: channels of the residual stream."""
    neurons: Tensor
    """``[layers, neurons]``"""
    heads: Tensor
    """``[layers, heads]``: query heads."""


def importance(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], object] | None = None) -> Importance:
    """Score every part by its activations on a few batches.

    Scores are mean magnitudes for neurons and normalized hidden channels, output norms for heads, and 1 minus the
    cosine similarity of input and output for layers (Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679,
    section 2.2).

    Args:
        model: A Llama-like transformers model (Llama, Mistral, Qwen2, Qwen3, Granite, SmolLM3).
        batches: Batches to pass to `forward`.
        forward: Runs the model on one batch. The default is `model(batch)`.

    Raises:
        QatkitError: the model is not Llama-like, or there are no batches.
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
    modes, used = [(module, module.training) for module in model.modules()], 0
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                (forward or model)(batch)
                used += 1
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    if not used:
        raise QatkitError("no batches were passed", key="batches", advice="pass a few batches of training data")
    return Importance(**sums)


def shrink(model: nn.Module, scores: Importance, shape: Shape) -> nn.Module:
    """Build a smaller model of the same class from the parts with the highest scores.

    Args:
        model: A Llama-like transformers model; it is not changed.
        scores: Scores from `importance`, `magnitude_importance` or `taylor_importance`.
        shape: The sizes of the new model.

    Returns:
        The new model, whose config has the new sizes.

    Raises:
        QatkitError: the model is not Llama-like; or a size is larger than before, conflicts with another size, or
            cannot be expressed in the model's config.
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
        queries, groups = _heads(scores.heads[index], new["heads"], old.kv_heads or 1, new["kv_heads"])
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
    config.num_attention_heads, config.num_key_value_heads = new["heads"], new["kv_heads"]
    smaller: Any = build_like(model, config, state)
    smaller.to(next(model.parameters()).device)
    # assign=True keeps each tensor's dtype: casting the whole model would also round the rotary frequencies
    smaller.load_state_dict(state, strict=True, assign=True)
    smaller.tie_weights()
    smaller.train(model.training)
    assert isinstance(smaller, nn.Module)
    return smaller


def _head_norms(x: Tensor, heads: int) -> Tensor:
    """Average the L2 norm of each head's output over tokens: ``[heads]``."""
    norms: Tensor = torch.linalg.vector_norm(x.float().reshape(-1, heads, x.shape[-1] // heads), dim=-1)
    return norms.mean(dim=0)


def _checked(old: Shape, shape: Shape) -> dict[str, int]:
    """Fill in the unchanged sizes, and check that all of them fit the model and each other."""
    sizes = {}
    for key, before in vars(old).items():
        wanted = vars(shape)[key]
        sizes[key] = before if wanted is None else wanted
        if not 1 <= sizes[key] <= before:
            raise QatkitError(f"{sizes[key]} is out of range", key=key, advice=f"use an integer from 1 to {before}")
    queries_per_group = (old.heads or 1) // (old.kv_heads or 1)
    if shape.heads is None:
        sizes["heads"] = sizes["kv_heads"] * queries_per_group
    heads, groups = sizes["heads"], sizes["kv_heads"]
    if heads % groups or heads // groups > queries_per_group:
        raise QatkitError(
            f"{heads} query heads cannot be divided among {groups} key-value heads with at most {queries_per_group} "
            "each",
            key="heads",
            advice=f"use a multiple of {groups} up to {groups * queries_per_group}",
        )
    return sizes


def _best(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest scores in ascending order; ties go to the last."""
    return scores.sort(stable=True).indices[len(scores) - count :].sort().values


def _heads(scores: Tensor, heads: int, old_groups: int, groups: int) -> tuple[Tensor, Tensor]:
    """Choose the query and key-value heads to keep: the best groups, with the same number of queries in each."""
    by_group = scores.view(old_groups, -1)
    kept = _best(by_group.sum(dim=1), groups)
    queries = [group * by_group.shape[1] + _best(by_group[group], heads // groups) for group in kept]
    return torch.cat(queries), kept


def _spread(heads: Tensor, head_dim: int) -> Tensor:
    """Expand head indices to the indices of their channels."""
    return (heads.unsqueeze(1) * head_dim + torch.arange(head_dim, device=heads.device)).flatten()


def _cut(value: Tensor, axes: tuple[str, ...], picks: Mapping[str, Tensor | None]) -> Tensor:
    """Select the kept indices along every axis of a parameter."""
    for dimension, axis in enumerate(axes[: value.dim()]):
        pick = picks[axis]
        if pick is not None:
            value = value.index_select(dimension, pick.to(value.device))
    return value.clone()
