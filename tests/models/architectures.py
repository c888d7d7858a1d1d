"""Tiny models of many architectures, each with a batch and the outputs that distillation compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.models import untrained_model
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec
from tests.models.families import tiny

WORDS = 30


@dataclass(frozen=True)
class Architecture:
    """An architecture, and what is pinned about it."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    """The keyword arguments of a call."""
    quantized: float
    """The fraction of the model's parameters that is quantized, rounded to three digits."""
    outputs: list[str | int] | None = None
    """See `KnowledgeDistillation`; None compares the output or its logits."""
    exclude: list[str] = field(default_factory=list)
    """Layers that are not quantized: those that share a weight with an embedding, or that no output depends on."""
    layers: dict[str, Scheme] = field(default_factory=dict)
    """Layers that are quantized in another way."""
    prunable: bool = True
    """Whether it has a layer that pruning selects."""
    unsupported: list[str] = field(default_factory=list)
    """Layers of types that cannot be quantized, which a warning names unless they are excluded."""
    warns: str | None = None
    """The warning of its training."""


class UNet(nn.Module):
    """Down, up through a transposed convolution, and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.up, self.head = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 3, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        skipped = self.down(pixel_values)
        logits: Tensor = self.head(torch.cat([skipped, self.up(self.middle(skipped))], dim=1))
        return logits


class Yolo(nn.Module):
    """A backbone with two scales, and for each a head of boxes and classes, as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = self._block(3, 8), self._block(8, 16)
        self.heads = nn.ModuleList([nn.Conv2d(8, 4 + 3, 1), nn.Conv2d(16, 4 + 3, 1)])

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        first = self.stem(pixel_values)
        scales = first, self.deep(first)
        return tuple(head(scale).flatten(2).mT for head, scale in zip(self.heads, scales, strict=True))

    @staticmethod
    def _block(width: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(width, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.SiLU())


class MobileV3(nn.Module):
    """An inverted residual with depthwise convolution, squeeze-and-excitation and hard swish."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.depth = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.Hardswish()
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), nn.Hardsigmoid()
        )
        self.project, self.head = nn.Sequential(nn.Conv2d(16, 3, 1), nn.BatchNorm2d(3)), nn.Linear(3, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.depth(self.expand(pixel_values))
        hidden = self.project(hidden * self.squeeze(hidden)) + pixel_values
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits


class Tagger(nn.Module):
    """A bidirectional LSTM that classifies tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(WORDS, 16), nn.LSTM(16, 8, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.words(input_ids))[0])
        return logits


def made(family: str, head: str, config: dict[str, Any], classes: int | None = None) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return untrained_model(family, head, config, num_classes=classes)

    return build


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return build()

    return make


def images(size: int = 32, channels: int = 3) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": _random(2, channels, size, size)}


def texts(words: int = WORDS) -> dict[str, Tensor]:
    ids = torch.randint(3, words, (2, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tokens() -> dict[str, Tensor]:
    return {"input_ids": texts()["input_ids"]}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


TEXT = {
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16,
}  # fmt: skip
VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
WHISPER = {
    "vocab_size": WORDS, "num_mel_bins": 8, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "suppress_tokens": [], "begin_suppress_tokens": [],
}  # fmt: skip
WAV = {
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "conv_dim": [8, 8], "conv_kernel": [4, 4], "conv_stride": [4, 4], "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "num_feat_extract_layers": 2,
}  # fmt: skip

ARCHITECTURES = [
    Architecture(
        "ResNet",
        made("resnet", "ImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                                               "layer_type": "basic"}, 3),
        images(), 0.988,
    ),
    Architecture("MobileNetV3", seeded(MobileV3), images(8), 0.867),
    Architecture(
        "EfficientNet",
        made("efficientnet", "ImageClassification",
             {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320, "initializer_range": 0.3,
              "in_channels": [32, 16],
              "out_channels": [16, 24], "kernel_sizes": [3, 3], "strides": [1, 2], "expand_ratios": [1, 2],
              "num_block_repeats": [1, 1], "depthwise_padding": []}, 3),
        images(), 0.81, unsupported=["*depthwise_conv.depthwise_conv"],
        warns=r"BatchNorm layers were not folded, .*depthwise_norm.*'net.efficientnet.encoder.top_bn'",
    ),
    Architecture(
        "ConvNeXt",
        made("convnext", "ImageClassification", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, 3),
        images(), 0.938,
    ),
    Architecture("ViT", made("vit", "ImageClassification", VIT, 3), images(), 0.909),
    Architecture(
        "Swin",
        made("swin", "ImageClassification", {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1],
                                             "num_heads": [1, 2], "window_size": 4}, 3),
        images(), 0.892,
    ),
    Architecture(
        "SegFormer",
        made("segformer", "SemanticSegmentation",
             {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [1, 2],
              "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2],
              "decoder_hidden_size": 16}, 3),
        images(), 0.926, warns=r"BatchNorm layers were not folded, .*'net.decode_head.batch_norm'",
    ),
    Architecture("U-Net", seeded(UNet), images(8, 1), 0.981),
    Architecture("YOLO", seeded(Yolo), images(16), 0.976, [0, 1]),
    Architecture("BERT", made("bert", "SequenceClassification", TEXT, 3), texts, 0.771),
    Architecture(
        "RoBERTa", made("roberta", "TokenClassification", TEXT, 3), texts, 0.761,
    ),
    Architecture(
        "DeBERTa",
        made("deberta-v2", "QuestionAnswering", TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
        texts, 0.734, ["start_logits", "end_logits"],
    ),
    Architecture(
        "MiniLM", made("bert", "Model", TEXT), texts, 0.718, ["last_hidden_state"], ["*pooler*"],
    ),
    Architecture(
        "T5",
        made("t5", "Seq2SeqLM", {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1,
                                 "num_heads": 2, "decoder_start_token_id": 0}),
        lambda: texts() | {"decoder_input_ids": texts()["input_ids"]}, 0.865, None, ["*lm_head"],
    ),
    Architecture("GPT-2", lambda: tiny("gpt2"), tokens, 0.662, None, ["*lm_head"], prunable=False),
    Architecture("Llama", lambda: tiny("llama"), tokens, 0.719),
    Architecture("Qwen3", lambda: tiny("qwen3"), tokens, 0.718),
    Architecture("Gemma 3", lambda: tiny("gemma3"), tokens, 0.607, None, ["*lm_head"]),
    Architecture("Mixtral", lambda: tiny("mixtral"), tokens, 0.84, layers={"*experts": Scheme(QuantSpec(4))}),
    Architecture(
        "Whisper", made("whisper", "SpeechSeq2Seq", WHISPER),
        lambda: {"input_features": _random(2, 8, 32), "decoder_input_ids": texts()["input_ids"]}, 0.796, None,
        ["*proj_out"],
    ),
    Architecture(
        "wav2vec 2.0", made("wav2vec2", "CTC", WAV), lambda: {"input_values": _random(2, 256)}, 0.768,
        exclude=["*pos_conv_embed.conv"], unsupported=["*pos_conv_embed.conv.*"],
    ),
    Architecture(
        "CLIP",
        made("clip", "Model", {
            "text_config": TEXT | {"projection_dim": 8, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
            "vision_config": VIT | {"projection_dim": 8}, "projection_dim": 8,
        }),
        lambda: images()() | texts(), 0.854, ["image_embeds", "text_embeds"],
    ),
    Architecture("LSTM tagger", seeded(Tagger), tokens, 0.722),
]  # fmt: skip
