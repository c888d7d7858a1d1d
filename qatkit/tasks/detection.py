"""Object detection with a transformers model that predicts labeled boxes and computes its own loss.

Batches are ``{"pixel_values": [N, C, H, W], "labels": [{"class_labels": [n], "boxes": [n, 4]}, ...]}``, with boxes as
center x, center y, width and height, relative to the image size. `qatkit.tasks.to_logits` concatenates the outputs
``logits [N, queries, classes + 1]``, whose last class is "no object", and ``pred_boxes [N, queries, 4]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.common.labels import IGNORED
from qatkit.errors import QatkitError

FAMILIES = ("detr", "table-transformer", "yolos")
"""Families of transformers models whose last class is "no object"; other families predict each class independently."""


def answers(outputs: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the outputs ``[N, queries, classes + 1 + 4]``, and labels ``[N, boxes, 5]`` (class and box).

    Images with fewer boxes are padded with `IGNORED`.

    Raises:
        QatkitError: the labels are not one mapping with ``class_labels`` and ``boxes`` per image.
    """
    labels = batch.get("labels")
    if (
        not isinstance(labels, list)
        or len(labels) != len(outputs)
        or not all(isinstance(each, Mapping) and {"class_labels", "boxes"} <= each.keys() for each in labels)
    ):
        raise QatkitError(
            f"labels of type {type(labels).__name__} do not contain one mapping of boxes per image",
            key="data",
            advice='use a list of {"class_labels": [n], "boxes": [n, 4]}',
        )
    rows = [torch.cat([each["class_labels"][:, None].float(), each["boxes"].float()], dim=1) for each in labels]
    return outputs, nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float(IGNORED)).to(outputs.device)


def own_loss(model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """Call a model with its labels, and return its output and its loss.

    Raises:
        QatkitError: the output has no loss.
    """
    output = model(**{name: value for name, value in batch.items() if name != "task"})
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise QatkitError(
            f"the model returned {type(output).__name__} without a loss",
            key="model",
            advice="return an object with .loss, .logits and .pred_boxes if the model is called with labels",
        )
    return output, loss


def check_model(model: nn.Module) -> None:
    """Raise an error if a transformers model has no "no object" class.

    Raises:
        QatkitError: the model family is not supported.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family is not None and family not in FAMILIES:
        raise QatkitError(
            f"'{family}' models are not supported by the task 'detection'",
            key="model",
            advice=f"use one of {', '.join(FAMILIES)}",
        )
