"""Channel pruning of convolutional networks; the optional package Torch-Pruning finds coupled channels."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.pruning.layers import PRUNABLE, check_pattern, matches
from qatkit.pruning.masks import check_sparsity

ROUNDING = 1e-9  # without it, a tenth of 10 channels would be 0.99999, rounded down to 0


def prune_channels(
    model: nn.Module,
    example: Tensor,
    ratio: float,
    exclude: Sequence[str] = (),
    multiple: int | None = None,
    scores: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Build a smaller copy of a model by removing the channels with the lowest scores from every layer.

    Coupled channels (through residual sums, concatenations or BatchNorm) are removed together (Fang et al. 2023,
    https://arxiv.org/abs/2301.12900). The default scores are L2 norms, averaged over the weights of a channel.

    Args:
        model: Any module that autograd can trace and that is not prepared for quantization. It is not changed.
        example: An example input.
        ratio: Fraction of channels to remove, from 0 to below 1.
        exclude: Globs over the names of layers that keep all channels, such as the output layer.
        multiple: Channel counts are rounded to multiples of this number, which allows faster kernels.
        scores: Scores of the output channels by layer name, from `channel_scores` or `taylor_channel_scores`.

    Returns:
        The smaller model.

    Raises:
        QatkitError: Torch-Pruning is not installed; a pattern matches nothing; a layer is not a plain layer, or shares
            a weight with another layer; the ratio removes all channels of a layer; or the shape of the output would
            change.
    """
    check_sparsity("ratio", ratio)
    check_channels(model, exclude)
    try:
        torch_pruning: Any = importlib.import_module("torch_pruning")
    except ImportError as error:
        raise QatkitError("channel pruning requires Torch-Pruning", advice="run: pip install torch-pruning") from error
    smaller = copy.deepcopy(model).eval()
    with torch.no_grad():
        before = smaller(example).shape
    pruner = torch_pruning.pruner.BasePruner(
        smaller,
        example,
        importance=_importance(torch_pruning, smaller, scores),
        pruning_ratio=ratio - ROUNDING,
        ignored_layers=[module for name, module in smaller.named_modules() if matches(name, exclude)],
        round_to=multiple,
    )
    graph, roots = pruner.DG, pruner.root_module_types
    groups = list(graph.get_all_groups(ignored_layers=pruner.ignored_layers, root_module_types=roots))
    if not groups:
        raise QatkitError(
            f"{list(exclude)} excludes every layer whose channels can be removed",
            key="exclude",
            advice="exclude fewer layers",
        )
    narrowest = sorted((_narrowest(pruner, group) for group in groups), key=lambda layer: layer[1] / layer[2])
    pruner.step()
    for name, channels, together in narrowest:
        # Torch-Pruning skips a group rather than remove all channels of one of its layers
        if graph.get_out_channels(smaller.get_submodule(name)) == channels > _kept(channels, ratio):
            raise _none_left(name, channels, ratio, max(together, multiple or 1))
    with torch.no_grad():
        after = smaller(example).shape
    if after != before:
        raise QatkitError(
            f"the output shape would change from {list(before)} to {list(after)}",
            key="exclude",
            advice="exclude the output layer, such as exclude=['classifier']",
        )
    return smaller.train(model.training)


def check_channels(model: nn.Module, exclude: Sequence[str] = (), ratio: float = 0) -> None:
    """Raise those errors of `prune_channels` that can be detected without an input.

    Args:
        model: Any module; it may be on torch's meta device.
        exclude: Globs over the names of layers that keep all channels.
        ratio: Fraction of channels to remove, from 0 to below 1.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PRUNABLE)}
    for index, pattern in enumerate(exclude):
        check_pattern(f"exclude[{index}]", pattern, list(layers))
    for name, layer in layers.items():
        if type(layer) not in PRUNABLE:
            raise QatkitError(
                f"layer '{name}' is a {type(layer).__name__}, which may have additional parameters",
                advice="prune before prepare_qat, or call strip_qat(model) first",
            )
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if (other := owners.setdefault(id(parameter), f"{name}.{kind}")) != f"{name}.{kind}":
                raise QatkitError(
                    f"layer '{name}' shares its {kind} with '{other}', but the two layers would be pruned separately",
                    advice="use one module in both places, or separate weights",
                )
    # the last layer usually computes the output and keeps its channels; if it does not, excluding it does no harm
    channels = {name: len(layers[name].weight) for name in list(layers)[:-1] if not matches(name, exclude)}
    if emptied := [name for name, count in channels.items() if not _kept(count, ratio)]:
        name = min(emptied, key=lambda name: channels[name])
        raise _none_left(name, channels[name], ratio)


def _importance(torch_pruning: Any, model: nn.Module, scores: Mapping[str, Tensor] | None) -> Any:
    """Make the importance function that Torch-Pruning calls on each group of layers with coupled channels."""
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


def _narrowest(pruner: Any, group: Any) -> tuple[str, int, int]:
    """Find the layer with the fewest channels in a group: its name, its channels, and their granularity.

    The granularity is above 1 for grouped convolutions and norms, which lose the same number of channels in each group.
    """
    names, graph = {module: name for name, module in pruner.model.named_modules()}, pruner.DG
    sources = [item.dep.target.module for item in group if graph.is_out_channel_pruning_fn(item.dep.handler)]
    channels = {names[layer]: graph.get_out_channels(layer) for layer in sources if layer in names}
    name = min(channels, key=lambda name: channels[name])
    counts = pruner.in_channel_groups, pruner.out_channel_groups
    return name, channels[name], max(part.get(item.dep.target.module, 1) for item in group for part in counts)


def _kept(channels: int, ratio: float) -> int:
    return int(channels * (1 - ratio + ROUNDING))


def _none_left(name: str, channels: int, ratio: float, least: int = 1) -> QatkitError:
    """Make the error about a layer that would keep fewer than `least` channels."""
    enough = 1 - math.ceil(1000 * least / channels) / 1000
    smaller = (
        f"use a ratio of {enough:.3g} or less (in a recipe, channels: {1 - enough:.3g} or more), or "
        if enough > 0
        else ""
    )
    count = f"{channels}, kept in multiples of {least}" if least > 1 else f"{channels}"
    return QatkitError(
        f"a ratio of {ratio:.3g} removes all channels of layer '{name}' ({count})",
        advice=f"{smaller}exclude the layer",
    )
