"""Scores of the channels that every layer of a network makes; the lowest are cut out first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.pruning.layers import PRUNABLE


def channel_scores(
    model: nn.Module, batches: Iterable[Any], run: Callable[[Any], Tensor], taylor: bool = False
) -> dict[str, Tensor]:
    """A score for every output channel of every linear and convolutional layer, averaged over batches.

    Args:
        model: Any module.
        batches: What `run` takes.
        run: Runs the model on one batch; with `taylor` it returns the loss.
        taylor: ``(sum of y * dL/dy) ** 2`` over a channel's outputs, Molchanov et al. (2019,
            https://arxiv.org/abs/1906.10771), equation 8; by default the mean of ``|y|``.

    Raises:
        QatkitError: there are no batches.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PRUNABLE)}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, inputs: Any, output: Tensor) -> None:
            outputs[name] = output

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    modes = [(module, module.training) for module in model.modules()]
    scores: dict[str, Tensor] = {}
    seen = 0
    try:
        model.eval()
        for batch in batches:
            with torch.set_grad_enabled(taylor):
                result = run(batch)
            names = list(outputs)
            if taylor:
                gradients = torch.autograd.grad(result, list(outputs.values()), allow_unused=True)
                parts = [0 * y if g is None else y * g for y, g in zip(outputs.values(), gradients, strict=True)]
                sums = [_by_channel(layers[name], part).sum(dim=1) for name, part in zip(names, parts, strict=True)]
                found = [value.detach().square() for value in sums]
            else:
                found = [_by_channel(layers[name], outputs[name].abs()).mean(dim=1) for name in names]
            for name, score in zip(names, found, strict=True):
                scores[name] = score + scores.get(name, 0)
            outputs.clear()
            seen += 1
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    if not seen:
        raise QatkitError("importance: there are no batches; pass a few that the model was trained on")
    return {name: score / seen for name, score in scores.items()}


def last_layer(model: nn.Module, example: Tensor) -> str:
    """The name of the linear or convolutional layer that runs last: as a rule it makes the output.

    Raises:
        QatkitError: no such layer runs.
    """
    ran: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, layer in model.named_modules()
        if isinstance(layer, PRUNABLE)
    ]
    mode = model.training
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        model.train(mode)
        for handle in handles:
            handle.remove()
    if not ran:
        raise QatkitError("model: no linear or convolutional layer runs, so it has no channels to cut out")
    return ran[-1]


def _by_channel(layer: nn.Module, values: Tensor) -> Tensor:
    """``[channels, everything else]``: channels come last for linear layers, and second for convolutions."""
    if isinstance(layer, nn.Linear):
        return values.float().flatten(0, -2).t()
    return values.float().transpose(0, 1).flatten(1)
