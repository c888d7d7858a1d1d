"""Find the positions that the loss includes, and check the class dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.common.labels import IGNORED
from qatkit.errors import QatkitError

CAUSAL = ("ForCausalLM", "LMHeadModel")
"""Class name suffixes of transformers models whose logits at one position predict the token at the next."""


def is_causal(model: nn.Module) -> bool:
    """Whether the model, or a submodule, is a transformers language model that predicts the next token."""
    return any(base.__name__.endswith(CAUSAL) for part in model.modules() for base in type(part).__mro__)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model, or a submodule, is a transformers encoder-decoder model."""
    return any(getattr(getattr(part, "config", None), "is_encoder_decoder", False) for part in model.modules())


def find_tensor(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], batch: Any) -> Tensor | None:
    """Look up a tensor by name in the arguments of a call, then in the batch.

    If the batch is a tuple or list, the labels are its second element.
    """
    for source in (kwargs, *args, batch):
        if isinstance(source, Mapping) and isinstance(source.get(name), Tensor):
            tensor: Tensor = source[name]
            return tensor
    if name == "labels" and isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(batch[1], Tensor):
        return batch[1]
    return None


def counted_positions(
    logits: Tensor, labels: Tensor | None, attention_mask: Tensor | None, causal: bool
) -> Tensor | None:
    """Return a mask that is True where the label is not -100 and the token is not padding; None includes all positions.

    Args:
        logits: ``[..., classes]``.
        labels: Used if they are integers ``[...]``.
        attention_mask: Used if its shape is ``[...]``.
        causal: Whether logits at one position predict the label at the next; if so, those at the last position are
            ignored.
    """
    places = logits.shape[:-1]
    mask: Tensor | None = None
    if labels is not None and labels.shape == places and not labels.is_floating_point():
        mask = labels != IGNORED
    present = attention_mask.bool() if attention_mask is not None and attention_mask.shape == places else None
    if not causal or len(places) != 2:
        return _both(mask, present)
    following = _both(mask, present)
    if following is None:
        return None
    following = following.roll(-1, dims=1)
    following[:, -1] = False
    return _both(following, present)


def check_class_dimension(logits: Tensor, labels: Tensor | None, compares_classes: bool) -> None:
    """Raise an error for dense predictions such as ``[N, C, H, W]``, whose classes are not in the last dimension.

    Args:
        logits: The student's logits, ``[..., classes]`` if they are supported.
        labels: The labels. They reveal the class dimension if they are integers with the shape of the logits minus one
            dimension.
        compares_classes: Whether the loss compares class probabilities.

    Raises:
        QatkitError: the labels show that the classes are in a different dimension, or the logits are four-dimensional
            and no labels confirm that the classes are last.
    """
    if logits.dim() < 3:
        return
    shape: torch.Size | None = None
    if labels is not None and not labels.is_floating_point():
        extra = labels.dim() == logits.dim() and labels.shape[1] == 1  # [N, 1, H, W]
        shape = labels.squeeze(1).shape if extra else labels.shape
    others = [dim for dim in range(1, logits.dim() - 1) if logits.shape[:dim] + logits.shape[dim + 1 :] == shape]
    is_last = shape == logits.shape[:-1] and (logits.dim() == 3 or not others)  # square texts are texts
    if is_last or not (others or (compares_classes and logits.dim() > 3)):
        return
    dim = others[0] if others else 1
    seen = f"logits have shape {list(logits.shape)}" + ("" if labels is None else f", labels {list(labels.shape)}")
    reason = f"so dimension {dim} is the class dimension" if others else "so the class dimension is unknown"
    raise QatkitError(
        f"{seen}, {reason}, but distillation compares the last dimension",
        key="class_dim",
        advice=f"pass class_dim={dim} to KnowledgeDistillation",
    )


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first & second
