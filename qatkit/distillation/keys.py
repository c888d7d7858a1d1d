"""Which sample a row of a batch is: a hash of what the model is called with, so that no data set has to number it.

The order of the data, the batch it is in, the process that sees it and the padding around it do not matter; a sample
that was changed on its way, by a random augmentation for example, is another one, for which a teacher's answer differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qatkit.errors import QatkitError

KEY_BYTES = 16
NO_INPUTS = ("labels", "attention_mask")
"""Entries of a batch that do not make a sample another one: the mask says only which tokens it is made of."""


def inputs_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with for a batch: all of a mapping, the first part of a tuple or list, or the batch."""
    if isinstance(batch, Mapping):
        return (), {name: value for name, value in batch.items() if name != "labels"}
    return (batch[0] if isinstance(batch, (tuple, list)) else batch,), {}


def present_tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The attention mask ``[samples, length]`` of a call as booleans, where it has one."""
    for name, value in _named(args, kwargs):
        if name == "attention_mask" and value.dim() == 2:
            return value.bool()
    return None


def sample_keys(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[bytes]:
    """A key of `KEY_BYTES` bytes for every sample of a call.

    Args:
        args: What the model is called with; tensors ``[samples, ...]``, or mappings of them.
        kwargs: The same by name. Of tensors ``[samples, length, ...]`` only the tokens count that "attention_mask"
            names.

    Raises:
        QatkitError: the call has no tensor.

    Example:
        >>> whole, padded = torch.tensor([[5, 6]]), torch.tensor([[0, 5, 6]])
        >>> mask = torch.tensor([[0, 1, 1]])
        >>> sample_keys((whole,), {}) == sample_keys((), {"input_ids": padded, "attention_mask": mask})
        True
    """
    present = present_tokens(args, kwargs)
    present = None if present is None else present.cpu()
    tensors = [value.detach().cpu() for name, value in _named(args, kwargs) if name not in NO_INPUTS and value.dim()]
    if not tensors:
        raise QatkitError("teacher cache: the model is called without a tensor, so its samples cannot be told apart")
    keys = []
    for row in range(len(tensors[0])):
        parts = []
        for tensor in tensors:
            kept = tensor[row]
            if present is not None and tensor.shape[:2] == present.shape:
                kept = kept[present[row]]
            digest = hashlib.blake2b(f"{kept.dtype} {list(kept.shape)}".encode(), digest_size=KEY_BYTES)
            digest.update(kept.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            parts.append(digest.digest())
        # sorted, as one model takes by name what another takes by position
        keys.append(parts[0] if len(parts) == 1 else _joined(sorted(parts)))
    return keys


def _joined(parts: list[bytes]) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=KEY_BYTES).digest()


def _named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for source in (dict(enumerate(args)), kwargs):
        for name, value in source.items():
            if isinstance(value, Mapping):
                yield from _named((), value)
            elif isinstance(value, Tensor):
                yield str(name), value
