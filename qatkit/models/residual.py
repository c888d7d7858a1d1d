"""A small residual network (He et al., 2016) for images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from qatkit.errors import QatkitError


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, whose output is added to the input before the last ReLU.

    Args:
        inputs: Input channels.
        outputs: Output channels. If they differ from `inputs`, height and width are halved, and a 1x1 convolution
            projects the input.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1, self.relu1 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, inputs, height, width]`` to ``[batch, outputs, ...]``; height and width may be halved."""
        out = self.relu1(self.norm1(self.conv1(x)))
        result: Tensor = self.relu2(self.norm2(self.conv2(out)) + self.shortcut(x))
        return result


def resnet(channels: Sequence[int] = (16, 32, 64), num_classes: int = 10, in_channels: int = 1) -> nn.Sequential:
    """Build a residual classifier: a 3x3 convolution, two blocks for each width, average pooling and a linear layer.

    Args:
        channels: Channels of each pair of blocks. The first block of every pair except the first halves height and
            width.
        num_classes: Number of outputs.
        in_channels: Channels of the image.

    Example:
        >>> import torch
        >>> resnet((8, 16))(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 10])

    Raises:
        QatkitError: `channels` is empty.
    """
    if not channels:
        raise QatkitError("[] defines no layers", key="channels", advice="use at least one width, such as [16, 32]")
    stem = nn.Sequential(
        nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()
    )
    blocks: list[nn.Module] = []
    inputs = channels[0]
    for out in channels:
        blocks += [Block(inputs, out), Block(out, out)]
        inputs = out
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(stem, nn.Sequential(*blocks), pooled, nn.Linear(inputs, num_classes))
