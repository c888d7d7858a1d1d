"""Data modules for image classification, multi-label classification and segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qatkit.common.labels import IGNORED
from qatkit.data.classes import check_classes, class_of
from qatkit.data.folders import classes_of
from qatkit.data.media import Loading, Sample, content_of, media_in, media_module
from qatkit.data.pictures import Box, ImageFormat, center_box, decoded, decoded_mask, random_box, random_flip
from qatkit.data.source import BadRecord, Source

if TYPE_CHECKING:
    from PIL.Image import Image

    from qatkit.data.record_datamodule import RecordDataModule


def image_classification(
    source: Source,
    classes: Sequence[str] | None = None,
    column: str = "image",
    label: str = "label",
    images: ImageFormat | None = None,
    workers: int = 0,
    batch_size: int = 32,
    seed: int = 0,
) -> RecordDataModule:
    """Load labeled images: pairs of images ``[N, channels, size, size]`` and classes ``[N]``.

    Training images are randomly cropped and flipped; other images are center-cropped.

    Args:
        source: A folder with one subfolder per class, or records with an image column. The column contains a path
            relative to the record's file, or an image in the format of `datasets`.
        classes: Class names in the order of the model's outputs. A record contains a name or an index. The default is
            the sorted names of the folders.
        column: The column with the image.
        label: The column with the class.
        images: Size, augmentation and normalization.
        workers: Number of worker processes that read images; 0 reads them in the training process.
        batch_size: Images per device per step.
        seed: Determines the training order and the random crops.

    Raises:
        QatkitError: there are fewer than two classes, an image is missing or cannot be decoded, a record has an unknown
            class, or a split would be empty.
    """
    known = classes_of(source, classes)
    shape = images or ImageFormat()

    def sample_of(record: Mapping[str, Any]) -> Sample | BadRecord:
        number = class_of(record, label, known)
        return number if isinstance(number, BadRecord) else _stored(record, column, shape) | {"label": number}

    def decode(sample: Sample, generator: torch.Generator, random: bool) -> tuple[Tensor, int]:
        image = decoded(content_of(sample["image"]), column, shape.grayscale)
        return shape.tensor(image, *_part(image, shape, random, generator, center=True)), sample["label"]

    options = {"kind": "image_classification", "columns": [column, label], "classes": known, "gray": shape.grayscale}
    loading = Loading(workers, batch_size, seed)
    return media_module(source, options, [column], sample_of, decode, "classification", known, loading, label)


def image_multilabel(
    source: Source,
    classes: Sequence[str],
    column: str = "image",
    label: str = "labels",
    images: ImageFormat | None = None,
    workers: int = 0,
    batch_size: int = 32,
    seed: int = 0,
) -> RecordDataModule:
    """Load multi-label images: pairs of images and targets ``[N, classes]``, float32, 0 or 1.

    Args:
        source: Records as in `image_classification`; a folder is not supported.
        classes: Label names in the order of the model's outputs.
        column: The column with the image.
        label: The column with a list of names or indices, which may be empty.
        images: Size, augmentation and normalization.
        workers: Number of worker processes that read images; 0 reads them in the training process.
        batch_size: Images per device per step.
        seed: Determines the training order and the random crops.

    Raises:
        QatkitError: for the same reasons as in `image_classification`.
    """
    check_classes(classes)
    shape = images or ImageFormat()

    def sample_of(record: Mapping[str, Any]) -> Sample | BadRecord:
        listed = record.get(label)
        if not isinstance(listed, list):
            return BadRecord(f"column '{label}' contains {type(listed).__name__}, not a list of labels")
        numbers = [class_of({label: each}, label, classes) for each in listed]
        bad = next((each for each in numbers if isinstance(each, BadRecord)), None)
        return bad or _stored(record, column, shape) | {"labels": numbers}

    def decode(sample: Sample, generator: torch.Generator, random: bool) -> tuple[Tensor, Tensor]:
        image = decoded(content_of(sample["image"]), column, shape.grayscale)
        targets = torch.zeros(len(classes))
        targets[torch.tensor(sample["labels"], dtype=torch.long)] = 1.0
        return shape.tensor(image, *_part(image, shape, random, generator, center=True)), targets

    options = {"kind": "image_multilabel", "columns": [column, label], "classes": [*classes], "gray": shape.grayscale}
    loading = Loading(workers, batch_size, seed)
    return media_module(source, options, [column], sample_of, decode, "multilabel", classes, loading)


def image_segmentation(
    source: Source,
    classes: Sequence[str],
    column: str = "image",
    mask: str = "mask",
    ignored: int = 255,
    images: ImageFormat | None = None,
    workers: int = 0,
    batch_size: int = 8,
    seed: int = 0,
) -> RecordDataModule:
    """Load images with segmentation masks: pairs of images and masks ``[N, size, size]``, int64.

    Training images and their masks are randomly cropped and flipped; other images are resized without cropping.

    Args:
        source: Records as in `image_classification`; a folder is not supported.
        classes: Class names in the order of the model's outputs.
        column: The column with the image.
        mask: The column with the mask: a single-channel image whose pixels are class indices.
        ignored: The value of pixels without a class; they become -100.
        images: Size, augmentation and normalization.
        workers: Number of worker processes that read images; 0 reads them in the training process.
        batch_size: Images per device per step.
        seed: Determines the training order and the random crops.

    Raises:
        QatkitError: for the same reasons as in `image_classification`; or if a mask differs in size from its image, or
            contains a pixel with an unknown class.
    """
    check_classes(classes)
    shape = images or ImageFormat()

    def mask_of(media: bytes | str) -> Image:
        return decoded_mask(content_of(media), mask, len(classes), ignored)

    def sample_of(record: Mapping[str, Any]) -> Sample | BadRecord:
        stored = media_in(record, mask)
        sample, (width, height) = _stored(record, column, shape), mask_of(stored).size
        if (width, height) != (size := decoded(content_of(sample["image"]), column, shape.grayscale).size):
            return BadRecord(f"column '{mask}' has {width} x {height} pixels, but the image has {size[0]} x {size[1]}")
        return sample | {"mask": stored}

    def decode(sample: Sample, generator: torch.Generator, random: bool) -> tuple[Tensor, Tensor]:
        image = decoded(content_of(sample["image"]), column, shape.grayscale)
        part = _part(image, shape, random, generator, center=False)
        pixels = shape.classes(mask_of(sample["mask"]), *part)
        return shape.tensor(image, *part), pixels.masked_fill(pixels == ignored, IGNORED)

    options = {
        "kind": "image_segmentation", "columns": [column, mask], "classes": [*classes], "ignored": ignored,
        "gray": shape.grayscale,
    }  # fmt: skip
    loading = Loading(workers, batch_size, seed)
    return media_module(source, options, [column, mask], sample_of, decode, "segmentation", classes, loading)


def _stored(record: Mapping[str, Any], column: str, shape: ImageFormat) -> Sample:
    """The image of a record, which was decoded once to be sure.

    Raises:
        BadRecord: it is missing or cannot be decoded.
    """
    media = media_in(record, column)
    decoded(content_of(media), column, shape.grayscale)
    return {"image": media}


def _part(image: Image, shape: ImageFormat, random: bool, generator: torch.Generator, center: bool) -> tuple[Box, bool]:
    """The part of an image that becomes a sample, and whether it is flipped."""
    if random and shape.augment:
        return random_box(*image.size, generator), random_flip(generator)
    return center_box(*image.size) if center else (0, 0, *image.size), False


# read by `qatkit.tasks.declared_task`, and by `qatkit.run.fingerprint`: the arguments that name columns of files
image_classification.task = "classification"  # type: ignore[attr-defined]
image_classification.media = ("column",)  # type: ignore[attr-defined]
image_multilabel.task = "multilabel"  # type: ignore[attr-defined]
image_multilabel.media = ("column",)  # type: ignore[attr-defined]
image_segmentation.task = "segmentation"  # type: ignore[attr-defined]
image_segmentation.media = ("column", "mask")  # type: ignore[attr-defined]
