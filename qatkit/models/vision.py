"""Small image classifiers that can run with integer arithmetic only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from qatkit.errors import QatkitError


class Chain(nn.Sequential):
    """A sequence of layers that can return the `cnn` or `mlp` arguments from which it can be rebuilt."""

    def arguments(self) -> dict[str, Any]:
        """Return the factory arguments of the current layers; a shrunk model is rebuilt from them."""
        convolutions = [layer.out_channels for layer in self if isinstance(layer, nn.Conv2d)]
        if convolutions:
            return {"channels": convolutions}
        return {"hidden": [layer.out_features for layer in self if isinstance(layer, nn.Linear)][:-1]}


def cnn(channels: Sequence[int] = (16, 32, 32), num_classes: int = 10, in_channels: int = 1, size: int = 8) -> Chain:
    """Build a classifier from 3x3 convolutions with BatchNorm and ReLU; 2x2 pooling follows each but the first.

    The last layer is linear on flattened rather than average-pooled features. Max pooling and flattening do not change
    codes, so every layer of the exported graph, including the last, has codes as input.

    Args:
        channels: Output channels of each convolution.
        num_classes: Number of outputs.
        in_channels: Channels of the image.
        size: Height and width of the image, in pixels.

    Example:
        >>> import torch
        >>> cnn()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Raises:
        QatkitError: there are no convolutions, or there are so many that pooling leaves no pixels.
    """
    if not channels:
        raise QatkitError("[] defines no layers", key="channels", advice="use at least one width, such as [16, 32]")
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
        raise QatkitError(
            f"{len(channels)} convolutions with pooling leave no pixels",
            key="channels",
            advice="use fewer convolutions",
        )
    layers |= {"flatten": nn.Flatten(), "classifier": nn.Linear(in_channels * size * size, num_classes)}
    return Chain(OrderedDict(layers))


def mlp(in_features: int = 64, hidden: Sequence[int] = (256, 256), num_classes: int = 10) -> Chain:
    """Build a multilayer perceptron with ReLU between its layers; images are flattened.

    Args:
        in_features: Number of inputs after flattening.
        hidden: Width of each hidden layer.
        num_classes: Number of outputs.

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
