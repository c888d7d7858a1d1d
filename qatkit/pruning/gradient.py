"""One-shot pruning of a trained model by gradient-based scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from qatkit.common.tables import implementation
from qatkit.errors import QatkitError
from qatkit.pruning.layers import prunable_layers
from qatkit.pruning.masks import apply_mask, check_floor, check_nm, check_sparsity, nm_mask
from qatkit.pruning.methods import METHODS
from qatkit.pruning.scores import taylor_scores
from qatkit.pruning.selection import lowest


def gradient_scores(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    score: Callable[[Tensor, Tensor], Tensor] = taylor_scores,
) -> dict[str, Tensor]:
    """Sum the scores of the layers' weights over batches, in float32.

    Near the end of training, the mean gradient is small and carries little information, whereas squared per-batch
    gradients do not cancel. The model runs in eval mode; train/eval modes, gradients and random states are restored.

    Args:
        model: The module that contains the layers.
        layers: Layers by name.
        batches: Batches to pass to `loss`.
        loss: Returns the loss of one batch, 0-d.
        score: Scores a weight from its gradient on one batch.

    Raises:
        QatkitError: there are no batches, or the loss does not depend on a layer.
    """
    weights = {name: cast(nn.Parameter, layer.weight) for name, layer in layers.items()}
    scores = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    modes = [(module, module.training) for module in model.modules()]
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    devices = {weight.device for weight in weights.values() if weight.device.type == "cuda"}
    empty = True
    try:
        model.eval()
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.enable_grad(), torch.random.fork_rng(devices=list(devices)):
            for batch in batches:
                empty = False
                gradients = torch.autograd.grad(loss(batch), list(weights.values()), allow_unused=True)
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                    if gradient is None:
                        raise QatkitError(f"the loss does not depend on layer '{name}'", advice="exclude the layer")
                    scores[name] += score(weight, gradient)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        for module, mode in modes:
            module.training = mode
    if empty:
        raise QatkitError("no batches were passed", key="batches", advice="pass a few batches of training data")
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
    method: str = "taylor",
) -> list[str]:
    """Prune the weights of `model` with the lowest scores, summed over batches, in place.

    Args:
        model: A trained model, on one process.
        batches: Batches to pass to `loss`.
        loss: Returns the loss of one batch, 0-d.
        sparsity: Fraction of pruned weights, from 0 to below 1. Set exactly one of `sparsity` and `nm`.
        nm: ``(N, M)`` keeps N of every M consecutive inputs.
        scope: "layer" prunes every layer to the same sparsity; "model" ranks the weights of all layers together.
        include: Globs over layer names; each must match a layer.
        exclude: Globs over layer names to exclude.
        method: A gradient-based method of `qatkit.pruning.methods.METHODS`; "taylor" is ``(w * g) ** 2``.

    Returns:
        The names of the pruned layers.

    Raises:
        QatkitError: the method is unknown; a pattern matches nothing; a setting is out of range or cannot be applied to
            a layer; there are no batches; the loss does not depend on a layer; or a layer would lose all its weights.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> prune_by_gradient(model, [torch.randn(4, 8)], lambda x: model(x).square().sum(), sparsity=0.5)
        ['0', '2']
    """
    row = METHODS.row(method, "method")
    if row.measures != "gradients":
        names = " or ".join(f"'{each.name}'" for each in METHODS.values() if each.measures == "gradients")
        raise QatkitError(f"'{method}' does not use gradients", key="method", advice=f"use {names}")
    if (sparsity is None) == (nm is None):
        raise QatkitError(
            "exactly one of sparsity and nm is required", key="sparsity", advice="pass sparsity=0.5 or nm=(2, 4)"
        )
    if sparsity is not None:
        check_sparsity("sparsity", sparsity)
    layers = prunable_layers(model, include, exclude)
    if nm is not None:
        for name, layer in layers.items():
            check_nm(name, cast(Tensor, layer.weight), *nm)
    scores = gradient_scores(model, layers, batches, loss, implementation(row.function))
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
