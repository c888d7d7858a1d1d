"""Data module for object detection: images with bounding boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qatkit.data.classes import check_classes, class_of
from qatkit.data.media import Loading, Sample, content_of, media_in, media_module
from qatkit.data.pictures import ImageFormat, decoded, random_flip
from qatkit.data.source import BadRecord, Source

if TYPE_CHECKING:
    from qatkit.data.record_datamodule import RecordDataModule

SLACK = 1.0
"""Number of pixels by which a box may extend beyond its image."""
LARGEST = 2.0**31
"""Upper limit for coordinates in pixels, because the sum of larger numbers could overflow."""


def image_detection(
    source: Source,
    classes: Sequence[str],
    column: str = "image",
    objects: str = "objects",
    images: ImageFormat | None = None,
    workers: int = 0,
    batch_size: int = 8,
    seed: int = 0,
) -> RecordDataModule:
    """Load images with bounding boxes, in batches for transformers detection models; see `qatkit.tasks.detection`.

    Whole images are resized without cropping; half of the training images are flipped.

    Args:
        source: Records as in `image_classification`; a folder is not supported.
        classes: Class names in the order of the model's outputs.
        column: The column with the image.
        objects: The column with the boxes, in the format of COCO datasets on the hub: ``{"bbox": [[x, y, width,
            height], ...], "category": [...]}``. Coordinates are in pixels from the top left corner; categories are
            class names or indices. Lists may be empty.
        images: Size, augmentation and normalization.
        workers: Number of worker processes that read images; 0 reads them in the training process.
        batch_size: Images per device per step.
        seed: Determines the training order and the flips.

    Raises:
        QatkitError: for the same reasons as in `image_classification`; or if a box is empty, outside its image or has
            an unknown class.
    """
    check_classes(classes)
    shape = images or ImageFormat()

    def sample_of(record: Mapping[str, Any]) -> Sample | BadRecord:
        media = media_in(record, column)
        size = decoded(content_of(media), column, shape.grayscale).size
        found = boxes_in(record, objects, classes, size)
        return found if isinstance(found, BadRecord) else {"image": media, "objects": found}

    def decode(sample: Sample, generator: torch.Generator, random: bool) -> dict[str, Any]:
        image = decoded(content_of(sample["image"]), column, shape.grayscale)
        flip = random and shape.augment and random_flip(generator)
        found = torch.tensor(sample["objects"], dtype=torch.float32).view(-1, 5)
        boxes = found[:, 1:] / torch.tensor([*image.size, *image.size])
        if flip:
            boxes[:, 0] = 1 - boxes[:, 0]
        pixels = shape.tensor(image, (0, 0, *image.size), flip)
        return {"pixel_values": pixels, "labels": {"class_labels": found[:, 0].long(), "boxes": boxes}}

    options = {"kind": "image_detection", "columns": [column, objects], "classes": [*classes], "gray": shape.grayscale}
    loading = Loading(workers, batch_size, seed)
    return media_module(source, options, [column], sample_of, decode, "detection", classes, loading, collate=_collate)


def boxes_in(
    record: Mapping[str, Any], column: str, classes: Sequence[str], size: tuple[int, int]
) -> list[list[float]] | BadRecord:
    """Return class, center x, center y, width and height of each box, or the reason why a box cannot be used.

    Example:
        >>> boxes_in({"objects": {"bbox": [[0, 2, 4, 6]], "category": ["dog"]}}, "objects", ["cat", "dog"], (9, 9))
        [[1, 2.0, 5.0, 4, 6]]
    """
    objects = record.get(column)
    boxes, names = (objects.get("bbox"), objects.get("category")) if isinstance(objects, Mapping) else (None, None)
    if not isinstance(boxes, list) or not isinstance(names, list) or len(boxes) != len(names):
        return BadRecord(f"column '{column}' does not contain lists 'bbox' and 'category' of equal length")
    found = []
    for number, (box, name) in enumerate(zip(boxes, names, strict=True), 1):
        label = class_of({"category": name}, "category", classes)
        if isinstance(label, BadRecord):
            return BadRecord(f"box {number} of column '{column}': {label.problem}")
        if not _inside(box, size):
            return BadRecord(
                f"box {number} of column '{column}' is {box}, which is empty or outside the image of {size[0]} x "
                f"{size[1]} pixels"
            )
        x, y, w, h = box
        found.append([label, x + w / 2, y + h / 2, w, h])
    return found


def _inside(box: Any, size: tuple[int, int]) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    if not all(isinstance(number, int | float) and abs(number) < LARGEST for number in box):  # NaN is not less
        return False
    x, y, w, h = box
    overlaps = x < size[0] and y < size[1] and x + w > 0 and y + h > 0
    fits = min(x, y) >= -SLACK and x + w <= size[0] + SLACK and y + h <= size[1] + SLACK
    return bool(min(w, h) > 0 and overlaps and fits)


def _collate(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor | list[dict[str, Tensor]]]:
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": [sample["labels"] for sample in samples],
    }


image_detection.task = "detection"  # type: ignore[attr-defined]  # read by `qatkit.tasks.declared_task`
image_detection.media = ("column",)  # type: ignore[attr-defined]  # read by `qatkit.run.fingerprint`
