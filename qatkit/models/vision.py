"""Small image classifiers whose every multiplication can run on integers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn


class Chain(nn.Sequential):
    """Layers in a row, which say what widths `cnn` or `mlp` would make them from."""

    def arguments(self) -> dict[str, Any]:
        """What the factory's arguments would be now: a shrunk model is written down with them."""
        convolutions = [layer.out_channels for layer in self if isinstance(layer, nn.Conv2d)]
        if convolutions:
            return {"channels": convolutions}
        return {"hidden": [layer.out_features for layer in self if isinstance(layer, nn.Linear)][:-1]}


def cnn(channels: Sequence[int] = (16, 32, 32), num_classes: int = 10, in_channels: int = 1, size: int = 8) -> Chain:
    """A convolutional classifier: blocks of 3x3 convolution, BatchNorm and ReLU, pooled by 2 after each but the first.

    It ends in a flattened linear layer rather than an average pool: max pooling and flattening move integers unchanged,
    so in the exported graph every layer, the last one too, takes its input as codes.

    Args:
        channels: Output channels of each block.
        num_classes: Outputs.
        in_channels: Channels of the image.
        size: Height and width of the image, in pixels.

    Example:
        >>> import torch
        >>> cnn()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if not channels:
        raise ValueError("channels: [] makes no network; write at least one number, such as [16, 32]")
    layers: dict[str, nn.Module] = {}
    for index, out in enumerate(channels, start=1):
        layers[f"conv{index}"] = nn.Conv2d(in_channels, out, 3, padding=1, bias=False)
        layers[f"norm{index}"] = nn.BatchNorm2d(out)
        layers[f"relu{index}"] = nn.ReLU()
        if index > 1:
            layers[f"pool{index}"] = nn.MaxPool2d(2)
            size //= 2
        in_channels = out
    if size < 1:
        raise ValueError(f"channels: {len(channels)} blocks pool the image away; write fewer")
    layers |= {"flatten": nn.Flatten(), "classifier": nn.Linear(in_channels * size * size, num_classes)}
    return Chain(OrderedDict(layers))


def mlp(in_features: int = 64, hidden: Sequence[int] = (256, 256), num_classes: int = 10) -> Chain:
    """A multilayer perceptron with ReLU between its layers; images are flattened.

    Args:
        in_features: Inputs, after flattening.
        hidden: Width of each hidden layer.
        num_classes: Outputs.

    Example:
        >>> import torch
        >>> mlp(in_features=64)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for out in hidden:
        layers += [nn.Linear(in_features, out), nn.ReLU()]
        in_features = out
    return Chain(*layers, nn.Linear(in_features, num_classes))
