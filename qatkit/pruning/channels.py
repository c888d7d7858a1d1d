"""Convolutional networks with fewer channels; what depends on a channel is found by Torch-Pruning, an extra."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.pruning.layers import PRUNABLE, matches, prunable_layers
from qatkit.pruning.masks import check_sparsity


def prune_channels(
    model: nn.Module, example: Tensor, ratio: float, exclude: Sequence[str] = (), multiple: int | None = None
) -> nn.Module:
    """A smaller copy of `model`: the share `ratio` of the channels of every layer is cut out, smallest norms first.

    Channels that belong together (through residual sums, concatenations, BatchNorm) go together: Fang et al. (2023,
    https://arxiv.org/abs/2301.12900). Its norms are L2, averaged over what belongs to a channel.

    Args:
        model: Any module that autograd can follow; not yet prepared for quantization.
        example: An input of it.
        ratio: Share of channels, from 0 to below 1.
        exclude: Globs over the names of layers that keep their channels, such as the one that makes the output.
        multiple: Rounds the numbers of channels to multiples of it, as fast kernels want them.

    Returns:
        The smaller model; the old one stays as it is.

    Raises:
        QatkitError: Torch-Pruning is not installed, a pattern matches nothing, a layer is no plain one, or the output
            would have another shape.
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
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[module for name, module in smaller.named_modules() if matches(name, exclude)],
        round_to=multiple,
    )
    pruner.step()
    with torch.no_grad():
        after = smaller(example).shape
    if after != before:
        raise QatkitError(
            f"exclude: the output's shape would become {list(after)} instead of {list(before)}; name the layer that "
            "makes the output, such as exclude=['classifier']"
        )
    return smaller.train(model.training)
