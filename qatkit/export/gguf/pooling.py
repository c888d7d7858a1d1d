"""How llama.cpp computes an embedding from the hidden states of a BERT, as declared by the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qatkit.errors import QatkitError, did_you_mean

POOLING = "bert.pooling_type"
"""The metadata key."""


def pooling_of(batch: Any) -> str:
    """Return the pooling that a batch declares; "none" if it declares none."""
    return str(batch.get("pooling", "none")) if isinstance(batch, Mapping) else "none"


def pooling_type(pooling: str) -> int:
    """Return the number by which GGUF identifies a pooling.

    Raises:
        QatkitError: there is no pooling with this name.

    Example:
        >>> pooling_type("mean")
        1
    """
    import gguf

    names = [kind.name.lower() for kind in gguf.PoolingType]
    if pooling not in names:
        raise QatkitError(f"unknown pooling '{pooling}'", key="pooling", advice=did_you_mean(pooling, names))
    return int(gguf.PoolingType[pooling.upper()])
