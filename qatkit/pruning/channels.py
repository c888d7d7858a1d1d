"""Convolutional networks with fewer channels; what depends on a channel is found by Torch-Pruning, an extra."""

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

ROUNDING = 1e-9  # else a tenth of 10 channels would be 0.99999 of one, and none


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
        QatkitError: Torch-Pruning is not installed, a pattern matches nothing, a layer is no plain one or has a weight
            of another, the ratio leaves a layer no channel, or the output would have another shape.
    """
    check_sparsity("ratio", ratio)
    check_channels(model, exclude)
    try:
        torch_pruning: Any = importlib.import_module("torch_pruning")
    except ImportError as error:
        raise QatkitError("channels are cut out by Torch-Pruning: pip install torch-pruning") from error
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
        raise QatkitError(f"exclude: {list(exclude)} leaves no layer whose channels can be cut out; exclude fewer")
    narrowest = sorted((_narrowest(pruner, group) for group in groups), key=lambda found: found[1] / found[2])
    pruner.step()
    for name, channels, together in narrowest:
        # Torch-Pruning leaves a group alone rather than take all that a layer of it has
        if graph.get_out_channels(smaller.get_submodule(name)) == channels > _kept(channels, ratio):
            raise _none_left(name, channels, ratio, max(together, multiple or 1))
    with torch.no_grad():
        after = smaller(example).shape
    if after != before:
        raise QatkitError(
            f"exclude: the output's shape would become {list(after)} instead of {list(before)}; name the layer that "
            "makes the output, such as exclude=['classifier']"
        )
    return smaller.train(model.training)


def check_channels(model: nn.Module, exclude: Sequence[str] = (), ratio: float = 0) -> None:
    """Raise what `prune_channels` would of a model, as far as it can be known without an input.

    Args:
        model: Maybe on torch's meta device.
        exclude: As there.
        ratio: As there.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PRUNABLE)}
    for index, pattern in enumerate(exclude):
        check_pattern(f"exclude[{index}]", pattern, list(layers))
    for name, layer in layers.items():
        if type(layer) not in PRUNABLE:
            raise QatkitError(
                f"layer '{name}': {type(layer).__name__} is no plain layer, and may hold more than its weight; prune "
                "before prepare_qat, or call strip_qat(model) first"
            )
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if (other := owners.setdefault(id(parameter), f"{name}.{kind}")) != f"{name}.{kind}":
                raise QatkitError(
                    f"layer '{name}': its {kind} is also '{other}', and each would be cut by itself; use one module at "
                    "both places, or give each a weight of its own"
                )
    # as a rule the last one makes the output and keeps its channels; where another does, excluding it changes nothing
    channels = {name: len(layers[name].weight) for name in list(layers)[:-1] if not matches(name, exclude)}
    if none := [name for name, count in channels.items() if not _kept(count, ratio)]:
        name = min(none, key=lambda name: channels[name])
        raise _none_left(name, channels[name], ratio)


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


def _narrowest(pruner: Any, group: Any) -> tuple[str, int, int]:
    """Of layers whose channels go together the one with fewest: its name, its channels, and what they come in.

    They come in more than one where a grouped convolution or norm loses as many of each of its groups.
    """
    names, graph = {module: name for name, module in pruner.model.named_modules()}, pruner.DG
    making = [item.dep.target.module for item in group if graph.is_out_channel_pruning_fn(item.dep.handler)]
    channels = {names[layer]: graph.get_out_channels(layer) for layer in making if layer in names}
    name = min(channels, key=lambda name: channels[name])
    counts = pruner.in_channel_groups, pruner.out_channel_groups
    return name, channels[name], max(part.get(item.dep.target.module, 1) for item in group for part in counts)


def _kept(channels: int, ratio: float) -> int:
    return int(channels * (1 - ratio + ROUNDING))


def _none_left(name: str, channels: int, ratio: float, least: int = 1) -> QatkitError:
    """A layer keeps at least one channel, of every group where it has groups."""
    enough = 1 - math.ceil(1000 * least / channels) / 1000
    write = f"ratio: {enough:.3g} or less (in a recipe channels: {1 - enough:.3g} or more), or " if enough > 0 else ""
    found = f"{channels}, which stay in multiples of {least}" if least > 1 else f"{channels}"
    return QatkitError(
        f"layer '{name}': ratio: {ratio:.3g} leaves none of its channels ({found}); write {write}exclude: ['{name}']"
    )
