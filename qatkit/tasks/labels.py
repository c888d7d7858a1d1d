"""Labels of a batch, and checks that they match the outputs of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qatkit.errors import QatkitError


def labels_in(batch: Mapping[str, Any]) -> Tensor:
    """Return the labels of a batch.

    Raises:
        QatkitError: the batch has no labels.
    """
    if "labels" not in batch:
        raise QatkitError(
            f"a batch has the keys {sorted(batch)}, but no 'labels'",
            key="data",
            advice="add 'labels' (for text, a copy of input_ids)",
        )
    labels: Tensor = batch["labels"]
    return labels


def labels_of(batch: Any) -> Tensor:
    """Return the ``labels`` of a mapping, or the second element of a pair.

    Raises:
        QatkitError: the batch has no labels.
    """
    if isinstance(batch, Mapping):
        return labels_in(batch)
    if not isinstance(batch, list | tuple) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        raise QatkitError(
            f"a batch is a {type(batch).__name__} without labels",
            key="data",
            advice="return pairs (inputs, labels), or mappings with 'labels'",
        )
    labels: Tensor = batch[1]
    return labels


def check_same_shape(outputs: Tensor, labels: Tensor, rule: str) -> None:
    """Raise an error unless there is one label for every output.

    Args:
        outputs: Outputs of the model.
        labels: Labels of the outputs.
        rule: The rule, for the advice in errors.

    Raises:
        QatkitError: the shapes differ.
    """
    if outputs.shape != labels.shape:
        raise QatkitError(
            f"labels of shape {list(labels.shape)} do not match outputs of shape {list(outputs.shape)}",
            key="data",
            advice=f"use {rule}",
        )


def check_shapes(logits: Tensor, labels: Tensor, dims: int) -> None:
    """Raise an error unless labels have `dims` dimensions and there is one label for each row of logits.

    Raises:
        QatkitError: the shapes differ.
    """
    if labels.dim() != dims or logits.shape[:-1] != labels.shape:
        raise QatkitError(
            f"labels of shape {list(labels.shape)} do not match logits of shape {list(logits.shape)}",
            key="data",
            advice="use one label per token, or one per sample",
        )
