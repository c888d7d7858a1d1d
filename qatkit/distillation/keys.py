"""Sample keys: a hash of the model inputs identifies each sample of a batch, so datasets need no sample indices.

A key does not depend on the order of the data, the batch, the process or the padding. A randomly augmented sample has a
different key, because its teacher outputs differ.
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
"""Batch entries that are not hashed: the mask only selects the tokens to hash."""


def inputs_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the model inputs of a batch: a mapping, the first element of a tuple or list, or the batch itself."""
    if isinstance(batch, Mapping):
        return (), {name: value for name, value in batch.items() if name != "labels"}
    return (batch[0] if isinstance(batch, (tuple, list)) else batch,), {}


def present_tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the attention mask ``[samples, length]`` of a call as booleans; None if the call has no mask."""
    for name, value in _named(args, kwargs):
        if name == "attention_mask" and value.dim() == 2:
            return value.bool()
    return None


def sample_keys(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[bytes]:
    """Compute a key of `KEY_BYTES` bytes for each sample of a call.

    Args:
        args: Positional model inputs: tensors ``[samples, ...]``, or mappings of them.
        kwargs: Keyword model inputs. In tensors ``[samples, length, ...]``, only tokens selected by "attention_mask"
            are hashed.

    Raises:
        QatkitError: the call has no tensor inputs.

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
        raise QatkitError(
            "the model is called without a tensor, so samples cannot be identified",
            key="teacher cache",
            advice="pass tensors to the model, or use a live teacher",
        )
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
        # sorted, because one model takes by name what another takes by position
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
