"""Scores of what can be cut out of a Llama-like model by its weights: their magnitude, or their part in the loss."""

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
    """Sum of squares of all weights that go with a part: a neuron's row in gate and up and its column in down.

    Args:
        model: A Llama-like model of transformers.

    Raises:
        QatkitError: the model is no such model.
    """
    return _by_part(model, {name: value.float().square() for name, value in model.named_parameters()})


def taylor_importance(model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Importance:
    """The squared change of the loss without a part, to first order: ``(sum of w * g) ** 2``, averaged over batches.

    Molchanov et al. (2019, https://arxiv.org/abs/1906.10771), equation 8, whose gate of a part multiplies all its
    weights: its derivative is the sum.

    Args:
        model: A Llama-like model of transformers.
        batches: What `loss` takes.
        loss: The model's loss on one batch, with its graph.

    Raises:
        QatkitError: the model is no such model, or there are no batches.
    """
    modes, seen = [(module, module.training) for module in model.modules()], 0
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
            found = {key: value.square() for key, value in vars(_by_part(model, products)).items()}
            total = Importance(**{key: found[key] + (vars(total)[key] if total else 0) for key in found})
            seen += 1
    finally:
        for module, mode in modes:
            module.training = mode
    if total is None:
        raise QatkitError("importance: there are no batches; pass a few that the model was trained on")
    return Importance(**{key: value / seen for key, value in vars(total).items()})


def _by_part(model: nn.Module, values: Mapping[str, Tensor]) -> Importance:
    """Numbers per weight, summed over the weights of each part; keys and values are shared out among their queries."""
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
                share = along.view(groups, -1).sum(dim=1) * groups / heads
                sums["heads"][index] += share.repeat_interleave(heads // groups)
    return Importance(**sums)
