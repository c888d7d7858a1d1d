"""The networks of `serve.py`, for images of ten classes: ``[batch, 1, 32, 32]``, or 64 tokens of 8x8 pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.models import cnn, mlp, resnet, untrained_model


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


class Encoder(nn.Module):
    """A transformer encoder whose mean output feeds the classifier (Dosovitskiy et al., 2021)."""

    def __init__(self, width: int = 128, layers: int = 3, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.positions = nn.Parameter(torch.zeros((32 // patch) ** 2, width))
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.blocks(tokens).mean(1))
        return logits


class RowReader(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.rnn = nn.LSTM(32, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(x[:, 0])[0][:, -1])
        return logits


class Bert(nn.Module):
    """A BERT that reads the 64 gray levels of an 8x8 image as tokens."""

    LEVELS = 17

    def __init__(self) -> None:
        super().__init__()
        shape = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512}
        fixed = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 64}
        shape |= {"vocab_size": self.LEVELS, "num_labels": 10} | fixed
        self.bert = untrained_model("bert", "SequenceClassification", shape)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.bert(input_ids=input_ids).logits
        return logits


@dataclass(frozen=True)
class Family:
    """A network, how it is trained, and how qatkit quantizes it."""

    build: Callable[[], nn.Module] | None
    """None if the network is trained elsewhere."""
    target: str = "onnxruntime"
    """The target for ONNX Runtime."""
    openvino: str | None = "openvino"
    """The target for OpenVINO; None is weight-only, with 8 bits."""
    strategy: Literal["channel", "tensor"] = "channel"
    """Whether each output of a weight has its own scale."""
    dense_steps: int = 200
    steps: int = 100
    lr: float = 3e-3
    tuning_lr: float = 1e-3
    """The learning rate while quantized."""
    batch: int = 64
    exclude: tuple[str, ...] = ()
    """Layers that stay in floating point."""
    embeddings: str | None = None
    """The embedding tables, with 8-bit weights, of a network that reads tokens."""
    integer: bool = True
    """Whether all products, additions and poolings should run on integer kernels."""
    deviation: float = 0.02
    """Allowed deviation from float64, as a fraction of the quantization error; larger behind LayerNorm and softmax."""
    metric: str = "accuracy"


_ENCODER = {"target": "onnxruntime-dynamic", "integer": False, "deviation": 0.5, "batch": 32, "lr": 1e-3}
_ENCODER |= {"dense_steps": 600, "tuning_lr": 3e-4}
FAMILIES: dict[str, Family] = {
    "MLP": Family(lambda: mlp(in_features=1024, hidden=(512, 512))),
    "CNN": Family(lambda: cnn(channels=(16, 32, 64), size=32)),
    "ResNet": Family(lambda: resnet((16, 32, 64))),
    "DenseNet": Family(DenseNet),
    "MobileNetV3": Family(mobilenet),
    # ONNX Runtime has no integer kernel for a convolution with dynamic activations
    "ViT": Family(Encoder, exclude=("*patches",), **_ENCODER),  # type: ignore[arg-type]
    "BERT": Family(Bert, embeddings="*_embeddings", **_ENCODER),  # type: ignore[arg-type]
    "MiniLM": Family(
        None, "onnxruntime-dynamic", steps=80, tuning_lr=1e-5, batch=8, exclude=("*pooler.*",),
        embeddings="*_embeddings", integer=False, deviation=0.5, metric="mean cosine",
    ),
    # quantize_dynamic, too, has one scale for each weight of an LSTM; OpenVINO has no integer kernel for recurrence
    "LSTM": Family(
        RowReader, "onnxruntime-dynamic", openvino=None, strategy="tensor", dense_steps=400, tuning_lr=3e-4,
        integer=False, deviation=0.5,
    ),
}  # fmt: skip
