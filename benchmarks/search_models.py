"""The models of `search.py`, their data, and the LightningModule that trains them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from qatkit.data import SplitDataModule, stdlib_text
from qatkit.models import cnn, llama, mlp, resnet, untrained_model
from qatkit.tasks import call, declared_task, mean_loss

LEVELS = 17


BLOCKS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
BLOCKS |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 10}


def vit() -> nn.Module:
    """A vision transformer that reads an image in 16 patches."""
    return untrained_model("vit", "ImageClassification", BLOCKS | {"image_size": 8, "patch_size": 2, "num_channels": 1})


def bert() -> nn.Module:
    """A BERT that reads the 64 gray levels of an 8x8 image as tokens."""
    shape = {"vocab_size": LEVELS, "max_position_embeddings": 64}
    return untrained_model("bert", "SequenceClassification", BLOCKS | shape)


class Fitted(LightningModule):
    """Any network with the loss of its task; the learning rate falls linearly."""

    def __init__(self, net: nn.Module, lr: float, data: Any) -> None:
        super().__init__()
        self.net, self.lr, self.declared = net, lr, declared_task(data)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return mean_loss(self, batch, self.declared)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        steps = max(self.trainer.max_steps, 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / steps, 0.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def glyphs(seed: int, count: int) -> TensorDataset:
    """Digits in the fonts of matplotlib as images ``[1, 8, 8]``, with random size, place, rotation and noise.

    A small data set would be the limit of every search: its validation split proves little.
    """
    draw, paths = random.Random(seed), sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("DejaVuS*.ttf"))
    paths = [path for path in paths if "Display" not in path.name]
    fonts = [ImageFont.truetype(str(path), size) for path in paths for size in (22, 24, 26)]
    images, labels = torch.empty(count, 1, 8, 8), torch.empty(count, dtype=torch.long)
    for index in range(count):
        label, font = draw.randrange(10), draw.choice(fonts)
        image = Image.new("L", (32, 32))
        place = (16 + draw.uniform(-1, 1), 16 + draw.uniform(-1, 1))
        ImageDraw.Draw(image).text(place, str(label), fill=255, font=font, anchor="mm")
        small = image.rotate(draw.uniform(-8, 8), Image.Resampling.BILINEAR).resize((8, 8), Image.Resampling.BOX)
        images[index, 0] = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(8, 8) / 255
        labels[index] = label
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return TensorDataset((images + 0.05 * noise).clamp(0, 1), labels)


def pictures(seed: int) -> Any:
    """Independent images for training, validation and test."""
    parts = [glyphs(10 * seed + part, count) for part, count in enumerate((4000, 2000, 2000))]
    return SplitDataModule(*parts, batch_size=64, seed=seed)


def levels(seed: int) -> Any:
    """The same as 64 tokens."""
    parts = [
        TensorDataset((part.tensors[0] * (LEVELS - 1)).round().long().flatten(1), part.tensors[1])
        for part in (getattr(pictures(seed), name) for name in ("train", "val", "test"))
    ]
    return SplitDataModule(*parts, batch_size=64, seed=seed)


def text(seed: int) -> Any:
    """Windows of 64 tokens of some packages of the standard library."""
    packages = ["email/*", "asyncio/*", "json/*", "unittest/*"]
    return stdlib_text(64, 512, include=packages, val_fraction=0.15, test_fraction=0.15, batch_size=16, seed=seed)


@dataclass(frozen=True)
class Family:
    """A network, and how it is trained."""

    build: Callable[[], nn.Module]
    data: Callable[[int], Any] = pictures
    dense_steps: int = 600
    steps: int = 200
    lr: float = 3e-3
    tuning_lr: float = 1e-3
    """The learning rate while quantized."""
    search: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `qatkit.search`."""


NARROWER = {"width": "0.75,0.5"}
FAMILIES = {
    "MLP": Family(lambda: mlp(64, (256, 256)), search=NARROWER),
    "CNN": Family(cnn, search=NARROWER),
    "ResNet": Family(lambda: resnet((16, 32)), search=NARROWER),
    "ViT": Family(vit, pictures, 600, lr=1e-3, tuning_lr=5e-4, search={"depth": "0.5"}),
    "BERT": Family(bert, levels, 800, lr=1e-3, tuning_lr=5e-4, search={"depth": "0.5"}),
    "Llama": Family(
        lambda: llama(512, 96, 2, 4, 2, 256, 64, tie_embeddings=False), text, 800, lr=3e-3, tuning_lr=1e-3,
        search={"include": ["*", "*embed_tokens"], "width": "0.5"},
    ),
}  # fmt: skip


def dense_module(family: Family, seed: int, steps: int) -> tuple[Fitted, Any]:
    """A trained module, with the learning rate for fine-tuning, and its data."""
    data = family.data(seed)
    data.prepare_data()
    for split in ("fit", "test"):
        data.setup(split)
    torch.manual_seed(seed)
    module = Fitted(family.build(), family.lr, data)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    module.lr = family.tuning_lr
    with torch.no_grad():
        call(module.eval(), next(iter(data.val_dataloader())))  # a module that cannot be called fails here
    return module, data
