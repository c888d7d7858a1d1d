"""The networks of `serve.py`, for images ``[batch, 1, 32, 32]`` of ten classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.models import cnn, mlp, resnet


class DenseNet(nn.Module):
    """Blocks that concatenate what they compute to what they read, with pooling between them."""

    def __init__(self, growth: int = 12, layers: int = 4, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2 * growth, 3, padding=1)
        width, self.blocks, self.squeezes = 2 * growth, nn.ModuleList(), nn.ModuleList()
        for _ in range(blocks):
            parts = [
                nn.Sequential(
                    nn.Conv2d(width + index * growth, growth, 3, padding=1, bias=False),
                    nn.BatchNorm2d(growth),
                    nn.ReLU(),
                )
                for index in range(layers)
            ]
            width += layers * growth
            self.blocks.append(nn.ModuleList(parts))
            self.squeezes.append(nn.Sequential(nn.Conv2d(width, width // 2, 1), nn.ReLU()))
            width //= 2
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for parts, squeeze in zip(self.blocks, self.squeezes, strict=True):
            for part in parts:  # type: ignore[attr-defined]  # a ModuleList
                x = torch.cat([x, part(x)], 1)
            x = F.max_pool2d(squeeze(x), 2)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class SqueezeExcite(nn.Module):
    """Scales channels by what their means say (Hu et al., 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels // 4, 1), nn.ReLU(),
            nn.Conv2d(channels // 4, channels, 1), nn.Hardsigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = x * self.gate(x)
        return scaled


class Inverted(nn.Module):
    """MobileNetV3's block: wide depthwise convolutions between narrow pointwise ones (Howard et al., 2019)."""

    def __init__(self, inputs: int, wide: int, outputs: int, stride: int, hardswish: bool, gate: bool) -> None:
        super().__init__()
        act = nn.Hardswish if hardswish else nn.ReLU
        parts: list[nn.Module] = [nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), act()]
        parts += [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), act()]
        parts += [SqueezeExcite(wide)] if gate else []
        parts += [nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.body, self.adds = nn.Sequential(*parts), stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.adds else out


def mobilenet() -> nn.Module:
    """A small MobileNetV3."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish()),
        Inverted(16, 32, 16, 1, False, True), Inverted(16, 64, 24, 2, False, False),
        Inverted(24, 72, 24, 1, False, True), Inverted(24, 96, 40, 2, True, True), Inverted(40, 120, 40, 1, True, True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 128), nn.Hardswish(), nn.Linear(128, 10),
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: mlp(in_features=1024, hidden=(512, 512)),
    "CNN": lambda: cnn(channels=(16, 32, 64), size=32),
    "ResNet": lambda: resnet((16, 32, 64)),
    "DenseNet": DenseNet,
    "MobileNetV3": mobilenet,
}
