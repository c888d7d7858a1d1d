"""Importance scores of the output channels of linear and convolutional layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.pruning.layers import PRUNABLE


def channel_scores(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], object]) -> dict[str, Tensor]:
    """Score every output channel of every linear and convolutional layer by its mean absolute activation.

    Args:
        model: Any module.
        batches: Batches to pass to `forward`.
        forward: Runs the model on one batch.

    Returns:
        Scores by layer name, ``[out]`` each, averaged over batches.

    Raises:
        QatkitError: there are no batches.
    """
    layers = _layers(model)

    def scores(batch: Any, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            forward(batch)
        return {name: _by_channel(layers[name], output.abs()).mean(dim=1) for name, output in outputs.items()}

    return _averaged(model, layers, batches, scores)


def taylor_channel_scores(model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Score every output channel by the squared first-order change of the loss when it is removed.

    The score is ``(sum of y * dL/dy) ** 2`` over a channel's outputs (Molchanov et al. 2019,
    https://arxiv.org/abs/1906.10771, equation 8).

    Args:
        model: Any module.
        batches: Batches to pass to `loss`.
        loss: Returns the model's loss on one batch, with its autograd graph.

    Returns:
        Scores by layer name, ``[out]`` each, averaged over batches.

    Raises:
        QatkitError: there are no batches.
    """
    layers = _layers(model)

    def scores(batch: Any, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.enable_grad():
            value = loss(batch)
        gradients = torch.autograd.grad(value, list(outputs.values()), allow_unused=True)
        parts = [0 * y if g is None else y * g for y, g in zip(outputs.values(), gradients, strict=True)]
        sums = [_by_channel(layers[name], part).sum(dim=1) for name, part in zip(outputs, parts, strict=True)]
        return {name: total.detach().square() for name, total in zip(outputs, sums, strict=True)}

    return _averaged(model, layers, batches, scores)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PRUNABLE)}


def _averaged(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    scores_of: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Average scores over batches in eval mode; `scores_of` runs the model, which records the layers' outputs."""
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, inputs: Any, output: Tensor) -> None:
            outputs[name] = output

        return hook

    handles = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    modes = [(module, module.training) for module in model.modules()]
    totals: dict[str, Tensor] = {}
    count = 0
    try:
        model.eval()
        for batch in batches:
            for name, score in scores_of(batch, outputs).items():
                totals[name] = score + totals.get(name, 0)
            outputs.clear()
            count += 1
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    if not count:
        raise QatkitError("no batches were passed", key="batches", advice="pass a few batches of training data")
    return {name: total / count for name, total in totals.items()}


def last_layer(model: nn.Module, example: Tensor) -> str:
    """Return the name of the linear or convolutional layer that runs last, usually the output layer.

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
        raise QatkitError(
            "the model runs no linear or convolutional layer, so it has no channels to remove",
            key="model",
            advice="use a network with linear or convolutional layers",
        )
    return ran[-1]


def _by_channel(layer: nn.Module, values: Tensor) -> Tensor:
    """Reshape outputs to ``[channels, rest]``: channels are the last dimension of linear layers, else the second."""
    if isinstance(layer, nn.Linear):
        return values.float().flatten(0, -2).t()
    return values.float().transpose(0, 1).flatten(1)
