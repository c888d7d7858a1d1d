"""Prune a trained model at once by how much its loss would change, to first order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.pruning.layers import prunable_layers
from qatkit.pruning.masks import apply_mask, check_floor, check_nm, check_sparsity, nm_mask
from qatkit.pruning.scores import taylor_scores
from qatkit.pruning.selection import lowest


def gradient_scores(
    model: nn.Module, layers: dict[str, nn.Module], batches: Iterable[Any], loss: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """`taylor_scores` of the layers' weights, summed over batches, float32.

    Near the end of training the mean gradient is small and says little; the squares of each batch's do not cancel out.
    Runs in eval mode; modes, gradients and random number generators are put back.

    Args:
        model: Holds the layers.
        layers: Layers by name.
        batches: What `loss` takes.
        loss: The loss of one batch, 0-d.

    Raises:
        QatkitError: no batches, or a layer that the loss does not depend on.
    """
    weights = {name: cast(nn.Parameter, layer.weight) for name, layer in layers.items()}
    scores = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    modes = [(module, module.training) for module in model.modules()]
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    devices = {weight.device for weight in weights.values() if weight.device.type == "cuda"}
    seen = False
    try:
        model.eval()
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.enable_grad(), torch.random.fork_rng(devices=list(devices)):
            for batch in batches:
                seen = True
                found = torch.autograd.grad(loss(batch), list(weights.values()), allow_unused=True)
                for (name, weight), gradient in zip(weights.items(), found, strict=True):
                    if gradient is None:
                        raise QatkitError(f"layer '{name}': the loss does not depend on it; exclude the layer")
                    scores[name] += taylor_scores(weight, gradient)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        for module, mode in modes:
            module.training = mode
    if not seen:
        raise QatkitError("prune_by_gradient: there are no batches; pass a few that the model was trained on")
    return scores


def prune_by_gradient(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
    scope: Literal["layer", "model"] = "layer",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> list[str]:
    """Prune the weights of `model` in place whose ``(w * g) ** 2``, summed over batches, is the lowest.

    Args:
        model: A trained model, on one process.
        batches: What `loss` takes.
        loss: The loss of one batch, 0-d.
        sparsity: Share of zeros, from 0 to below 1; give it or `nm`.
        nm: ``(N, M)`` keeps N of every M neighbouring inputs.
        scope: "layer" prunes every layer to this share, "model" the lowest scores of all layers together.
        include: Globs over layer names; every one must match a layer.
        exclude: Globs over layer names that are left alone.

    Returns:
        The names of the pruned layers.

    Raises:
        QatkitError: a pattern matches nothing, settings are out of range or do not fit a layer, no batches, or a layer
            that the loss does not depend on or that would lose all its weights.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> prune_by_gradient(model, [torch.randn(4, 8)], lambda x: model(x).square().sum(), sparsity=0.5)
        ['0', '2']
    """
    if (sparsity is None) == (nm is None):
        raise QatkitError("prune_by_gradient: write one of sparsity=0.5 and nm=(2, 4)")
    if sparsity is not None:
        check_sparsity("sparsity", sparsity)
    layers = prunable_layers(model, include, exclude)
    if nm is not None:
        for name, layer in layers.items():
            check_nm(name, cast(Tensor, layer.weight), *nm)
    scores = gradient_scores(model, layers, batches, loss)
    if nm is not None:
        masks = {name: nm_mask(values, *nm) for name, values in scores.items()}
    elif scope == "model":
        masks = lowest(scores, round((sparsity or 0.0) * sum(values.numel() for values in scores.values())))
    else:
        masks = {}
        for name, values in scores.items():
            count = round((sparsity or 0.0) * values.numel())
            check_floor(name, values.numel() - count, values.numel())
            masks |= lowest({name: values}, count)
    for name, mask in masks.items():
        check_floor(name, int(mask.sum()), mask.numel())
    for name, mask in masks.items():
        apply_mask(cast(Tensor, layers[name].weight), mask)
    return list(layers)
