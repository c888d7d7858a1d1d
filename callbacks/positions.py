"""Which positions of a sequence count, from what a training step hands around anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qatkit.distillation.losses import IGNORED

CAUSAL = ("ForCausalLM", "LMHeadModel")
"""How transformers names the models whose logits at one position predict the token at the next."""


def is_causal(model: nn.Module) -> bool:
    """Whether the model, or one inside of it, is a language model of transformers that predicts the next token."""
    return any(base.__name__.endswith(CAUSAL) for part in model.modules() for base in type(part).__mro__)


def find(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], batch: Any) -> Tensor | None:
    """A tensor of this name in the arguments of a call, else in the batch.

    The labels of a batch that is a tuple or list are its second element.
    """
    for source in (kwargs, *args, batch):
        if isinstance(source, Mapping) and isinstance(source.get(name), Tensor):
            tensor: Tensor = source[name]
            return tensor
    if name == "labels" and isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(batch[1], Tensor):
        return batch[1]
    return None


def counted(logits: Tensor, labels: Tensor | None, attention_mask: Tensor | None, causal: bool) -> Tensor | None:
    """True where the logits count: the label is not -100 and the token no padding; None where all do.

    Args:
        logits: ``[..., classes]``.
        labels: Used where they are whole numbers ``[...]``.
        attention_mask: Used where it is ``[...]``.
        causal: The logits at one position answer to the label at the next, so the last position answers to none.
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


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first & second
