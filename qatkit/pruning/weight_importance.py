"""Weight-based importance scores for the parts of a Llama-like model: magnitude and first-order Taylor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.pruning.axes import axes_of, prefix_of
from qatkit.pruning.structure import Importance


@torch.no_grad()
def magnitude_importance(model: nn.Module) -> Importance:
    """Score every part by the sum of squares of its weights.

    The weights of a neuron, for example, are its rows in the gate and up projections and its column in the down
    projection.

    Args:
        model: A Llama-like transformers model.

    Raises:
        QatkitError: the model is not Llama-like.
    """
    return _by_part(model, {name: value.float().square() for name, value in model.named_parameters()})


def taylor_importance(model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Importance:
    """Score every part by the squared first-order change of the loss when it is removed.

    The score is ``(sum of w * g) ** 2`` over the part's weights, averaged over batches. This is equation 8 of Molchanov
    et al. (2019, https://arxiv.org/abs/1906.10771) for a gate that multiplies all weights of the part.

    Args:
        model: A Llama-like transformers model.
        batches: Batches to pass to `loss`.
        loss: Returns the model's loss on one batch, with its autograd graph.

    Raises:
        QatkitError: the model is not Llama-like, or there are no batches.
    """
    modes, used = [(module, module.training) for module in model.modules()], 0
    total: Importance | None = None
    weights = dict(model.named_parameters())
    try:
        model.eval()
        for batch in batches:
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss(batch), list(weights.values()), allow_unused=True)
            products = {
                name: weight.detach().float() * gradient.float()
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
                if gradient is not None
            }
            scores = {key: value.square() for key, value in vars(_by_part(model, products)).items()}
            total = Importance(**{key: scores[key] + (vars(total)[key] if total else 0) for key in scores})
            used += 1
    finally:
        for module, mode in modes:
            module.training = mode
    if total is None:
        raise QatkitError("no batches were passed", key="batches", advice="pass a few batches of training data")
    return Importance(**{key: value / used for key, value in vars(total).items()})


def _by_part(model: nn.Module, values: Mapping[str, Tensor]) -> Importance:
    """Sum per-weight values over each part; those of keys and values are divided among their query heads."""
    prefix = prefix_of(model)
    config: Any = model.config
    count, heads, groups = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    device = next(model.parameters()).device
    sums = {
        "layers": torch.zeros(count, device=device),
        "hidden": torch.zeros(config.hidden_size, device=device),
        "neurons": torch.zeros(count, config.intermediate_size, device=device),
        "heads": torch.zeros(count, heads, device=device),
    }
    for name, value in values.items():
        index = -1
        if name.startswith(f"{prefix}layers."):
            index = int(name.removeprefix(f"{prefix}layers.").partition(".")[0])
            sums["layers"][index] += value.sum()
        for dimension, axis in enumerate(axes_of(prefix, name)[: value.dim()]):
            along = value.movedim(dimension, 0).flatten(1).sum(dim=1) if value.dim() > 1 else value
            if axis == "hidden":
                sums["hidden"] += along
            elif axis == "neuron":
                sums["neurons"][index] += along
            elif axis == "head":
                sums["heads"][index] += along.view(heads, -1).sum(dim=1)
            elif axis == "group":
                per_query = along.view(groups, -1).sum(dim=1) * groups / heads
                sums["heads"][index] += per_query.repeat_interleave(heads // groups)
    return Importance(**sums)
