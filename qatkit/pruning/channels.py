"""Convolutional networks with fewer channels; what depends on a channel is found by Torch-Pruning, an extra."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.pruning.layers import PRUNABLE, matches, prunable_layers
from qatkit.pruning.masks import check_sparsity


def prune_channels(
    model: nn.Module,
    example: Tensor,
    ratio: float,
    exclude: Sequence[str] = (),
    multiple: int | None = None,
    scores: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A smaller copy of `model`: the share `ratio` of the channels of every layer is cut out, lowest scores first.

    Channels that belong together (through residual sums, concatenations, BatchNorm) go together: Fang et al. (2023,
    https://arxiv.org/abs/2301.12900). By default scores are L2 norms, averaged over what belongs to a channel.

    Args:
        model: Any module that autograd can follow; not yet prepared for quantization.
        example: An input of it.
        ratio: Share of channels, from 0 to below 1.
        exclude: Globs over the names of layers that keep their channels, such as the one that makes the output.
        multiple: Rounds the numbers of channels to multiples of it, as fast kernels want them.
        scores: For each output channel of the layers by name, from `channel_scores`.

    Returns:
        The smaller model; the old one stays as it is.

    Raises:
        QatkitError: Torch-Pruning is not installed, a pattern matches nothing, a layer is no plain one, the ratio
            leaves a layer no channel, or the output would have another shape.
    """
    check_sparsity("ratio", ratio)
    try:
        torch_pruning: Any = importlib.import_module("torch_pruning")
    except ImportError as error:
        raise QatkitError("channels are cut out by Torch-Pruning: pip install torch-pruning") from error
    if exclude:
        prunable_layers(model, include=exclude)  # for its check of patterns
    for name, layer in model.named_modules():
        if isinstance(layer, PRUNABLE) and type(layer) not in PRUNABLE:
            raise QatkitError(
                f"layer '{name}': {type(layer).__name__} is no plain layer, and may hold more than its weight; prune "
                "before prepare_qat, or call strip_qat(model) first"
            )
    smaller = copy.deepcopy(model).eval()
    with torch.no_grad():
        before = smaller(example).shape
    pruner = torch_pruning.pruner.BasePruner(
        smaller,
        example,
        importance=_importance(torch_pruning, smaller, scores),
        pruning_ratio=ratio,
        ignored_layers=[module for name, module in smaller.named_modules() if matches(name, exclude)],
        round_to=multiple,
    )
    pruner.step()
    _check_floor(model, smaller, ratio)
    with torch.no_grad():
        after = smaller(example).shape
    if after != before:
        raise QatkitError(
            f"exclude: the output's shape would become {list(after)} instead of {list(before)}; name the layer that "
            "makes the output, such as exclude=['classifier']"
        )
    return smaller.train(model.training)


def _importance(torch_pruning: Any, model: nn.Module, scores: Mapping[str, Tensor] | None) -> Any:
    """What Torch-Pruning asks about a group of layers whose channels go together."""
    if scores is None:
        return torch_pruning.importance.GroupMagnitudeImportance(p=2)
    by_layer = {model.get_submodule(name): score.cpu() for name, score in scores.items()}
    outward = (torch_pruning.prune_conv_out_channels, torch_pruning.prune_linear_out_channels)

    def mean_score(group: Any) -> Tensor:
        total, layers = torch.zeros(len(group[0].idxs)), 0
        for item in group:
            layer = item.dep.target.module
            if item.dep.handler in outward and layer in by_layer and None not in item.root_idxs:
                total.scatter_add_(0, torch.tensor(item.root_idxs), by_layer[layer][item.idxs])
                layers += 1
        return total / max(layers, 1)

    return mean_score


def _check_floor(before: nn.Module, after: nn.Module, ratio: float) -> None:
    """A layer keeps at least one channel: Torch-Pruning leaves one alone rather than take all that it has."""
    for name, layer in after.named_modules():
        old = before.get_submodule(name)
        if isinstance(layer, PRUNABLE) and isinstance(old, PRUNABLE) and not layer.weight.numel():
            raise QatkitError(f"ratio: {ratio} leaves layer '{name}' none of its {len(old.weight)} channels; cut less")
