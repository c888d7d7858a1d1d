"""Decode images with Pillow, crop and resize them, and convert them to normalized tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qatkit.data.source import BadRecord
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""Ranges of random crops: fraction of the image area, and aspect ratio (Szegedy et al. 2014, "Going Deeper with
Convolutions", section 6).
"""
CENTER = 224 / 256
"""Fraction of the shorter side that evaluation keeps."""
SCALED = {"L;2": 85, "L;4": 17}
"""Factors by which Pillow multiplies 2-bit and 4-bit gray values to fill 8 bits."""
KINDS = {"I": "32", "I;16": "16", "I;16B": "16", "I;16L": "16", "F": "32"}
"""Pillow modes with more than 8 bits per pixel, which Pillow would clip to 255."""


@dataclass(frozen=True)
class ImageFormat:
    """How images are converted to tensors ``[channels, size, size]``."""

    size: int = 224
    """Height and width."""
    grayscale: bool = False
    """Use one channel instead of red, green and blue."""
    augment: bool = True
    """Crop training images randomly and flip half of them."""
    mean: list[float] | None = None
    """Mean of each channel in [0, 1], subtracted from the image. The default is ImageNet's mean, or 0.5 for grayscale
    images.
    """
    std: list[float] | None = None
    """Standard deviation of each channel, which divides the image. The default is ImageNet's, or 0.5 for grayscale
    images.
    """

    def __post_init__(self) -> None:
        if self.size < 1:
            raise QatkitError(f"{self.size} is out of range", key="size", advice="use a positive integer")
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise QatkitError(
                    f"{values} has {len(values)} values, but the images have {self.channels} channels",
                    key=key,
                    advice=f"use {self.channels}",
                )
            if values is not None and not all(map(math.isfinite, values)):
                raise QatkitError(f"{values} is not finite", key=key, advice="use finite numbers")
        if self.std is not None and min(self.std) <= 0:
            raise QatkitError(f"{self.std} is out of range", key="std", advice="use positive numbers")

    @property
    def channels(self) -> int:
        """Number of channels."""
        return 1 if self.grayscale else 3

    def tensor(self, image: Image, box: Box, flip: bool) -> Tensor:
        """Return a crop of an image as a normalized tensor ``[channels, size, size]``, float32.

        Args:
            image: The result of `decoded`.
            box: The crop.
            flip: Whether to flip it horizontally.
        """
        from PIL.Image import Resampling

        pixels = torch.from_numpy(np.array(image.resize((self.size, self.size), Resampling.BILINEAR, box)))
        values = pixels.view(self.size, self.size, self.channels).permute(2, 0, 1).float() / 255
        mean = self.mean or ([0.5] if self.grayscale else [0.485, 0.456, 0.406])
        std = self.std or ([0.5] if self.grayscale else [0.229, 0.224, 0.225])
        made = (values - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        return made.flip(-1) if flip else made

    def classes(self, mask: Image, box: Box, flip: bool) -> Tensor:
        """Return the same crop of a mask ``[size, size]``, int64, without interpolating between classes."""
        from PIL.Image import Resampling

        values = np.array(mask.resize((self.size, self.size), Resampling.NEAREST, box)).astype(np.int64)
        made = torch.from_numpy(values)
        return made.flip(-1) if flip else made


def decoded(content: bytes, column: str, grayscale: bool) -> Image:
    """Decode an image with 8 bits per channel, and apply its EXIF orientation.

    Raises:
        BadRecord: the image cannot be decoded, or its channels have more than 8 bits.
    """
    ops = _pillow().ImageOps
    with _opened(content, column) as opened:
        if opened.mode in KINDS:
            raise BadRecord(
                f"column '{column}' is an image with {KINDS[opened.mode]} bits per channel", "convert it to 8 bits"
            )
        try:
            upright: Image = ops.exif_transpose(opened).convert("L" if grayscale else "RGB")
        except Exception as error:  # Pillow's decoders fail in any way on damaged data
            raise _not_decodable(column, error) from error
    return upright


def decoded_mask(content: bytes, column: str, classes: int, ignored: int) -> Image:
    """Decode a mask (a single-channel image whose pixels are class indices), and apply its EXIF orientation.

    Raises:
        BadRecord: the mask cannot be decoded, has multiple channels, or contains an unknown class index.
    """
    pillow = _pillow()
    with _opened(content, column) as opened:
        factor = _gray_factor(opened)
        try:
            upright: Image = pillow.ImageOps.exif_transpose(opened)
        except Exception as error:  # as above
            raise _not_decodable(column, error) from error
        if opened.mode not in ("1", "L", "P"):
            raise BadRecord(
                f"column '{column}' is an image of mode {opened.mode}, not one of class indices",
                "use an image with one channel of 8 bits",
            )
        mask = upright.point(lambda value: value // factor) if factor > 1 else upright.copy()
    unknown = sorted(set(np.unique(np.array(mask)).tolist()) - {*range(classes), ignored})
    if unknown:
        raise BadRecord(f"column '{column}' has pixels of class {int(unknown[0])}, but there are {classes} classes")
    return mask


def _gray_factor(opened: Image) -> int:
    tiles = getattr(opened, "tile", [])  # how the decoder reads each pixel, which loading forgets
    raw = tiles[0][3] if tiles else ""
    return SCALED.get(str(raw[0] if isinstance(raw, tuple) else raw)[:3], 1)


def center_box(width: int, height: int) -> Box:
    """Return the center square of an image that is used for evaluation."""
    side = min(width, height) * CENTER
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, generator: torch.Generator) -> Box:
    """Return a random crop of an image, with the sampling method of torchvision's ``RandomResizedCrop``."""
    for _ in range(10):
        area = _between(*AREA, generator) * width * height
        ratio = math.exp(_between(math.log(RATIO[0]), math.log(RATIO[1]), generator))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = _between(0, width - w, generator), _between(0, height - h, generator)
            return left, top, left + w, top + h
    w, h = min(width, height * RATIO[1]), min(height, width / RATIO[0])
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def random_flip(generator: torch.Generator) -> bool:
    """Decide at random whether to flip an image."""
    return bool(torch.rand((), generator=generator) < 0.5)


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _opened(content: bytes, column: str) -> Image:
    try:
        opened: Image = _pillow().Image.open(BytesIO(content))
    except Exception as error:  # Pillow's decoders fail in any way on damaged data
        raise _not_decodable(column, error) from error
    return opened


def _not_decodable(column: str, error: Exception) -> BadRecord:
    return BadRecord(f"column '{column}' cannot be decoded as an image ({' '.join(str(error).split())[:100]})")


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise QatkitError(
            "Pillow, which decodes images, is not installed",
            key="data.factory",
            advice="run: pip install 'qatkit[images]'",
        ) from error
    return PIL
