"""Small networks with the structures whose results are quantized: residual additions, concatenations, poolings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """ResNet's basic block: one ReLU module for two calls, in place, as in torchvision."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.down = None
        if (inputs, stride) != (outputs, 1):
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.down is None else self.down(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        result: Tensor = self.relu(out)
        return result


class ResNet(nn.Module):
    """Images ``[batch, 3, 16, 16]`` to logits ``[batch, 10]``."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(Block(width, width), Block(width, 2 * width, 2))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.blocks(self.stem(x))).flatten(1))
        return logits


class Dense(nn.Module):
    """Concatenations and a mean over positions, as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.three, self.head = nn.Conv2d(16, 8, 3, padding=1), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.one(x))
        two = torch.cat([one, F.relu(self.two(one))], 1)
        three = torch.cat([two, F.relu(self.three(two))], 1)
        logits: Tensor = self.head(F.max_pool2d(three, 2).mean((2, 3)))
        return logits


class UNet(nn.Module):
    """A resize and a concatenation across scales."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        down = F.relu(self.down(x))
        middle = F.relu(self.middle(F.max_pool2d(down, 2)))
        pixels: Tensor = self.out(torch.cat([down, F.interpolate(middle, scale_factor=2.0)], 1))
        return pixels


class Denoiser(nn.Module):
    """A residual addition of the network's own input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        cleaned: Tensor = x + self.body(x)
        return cleaned


def trained_like(model: nn.Module) -> nn.Module:
    """Give BatchNorm statistics that are not those of a new model."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()
