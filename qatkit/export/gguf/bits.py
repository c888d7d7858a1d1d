"""Codes of a few bits and float16 numbers as bytes, in the layouts of GGUF."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def packed_bits(codes: Array, bits: int, distance: int) -> Array:
    """Pack unsigned codes ``[..., n]``: those of one byte are `distance` apart, the first in the lowest bits.

    Example:
        >>> packed_bits(np.array([1, 2, 3, 4]), 4, 2).tolist()  # 1 and 3, 2 and 4
        [49, 66]
    """
    runs = codes.astype(np.uint8).reshape(*codes.shape[:-1], -1, 8 // bits, distance)
    packed: Array = np.bitwise_or.reduce(runs << _shifts(bits), axis=-2)
    return packed.reshape(*codes.shape[:-1], -1)


def unpacked_bits(stored: Array, bits: int, distance: int) -> Array:
    """Return the codes of `packed_bits`."""
    runs = stored.reshape(*stored.shape[:-1], -1, 1, distance) >> _shifts(bits) & np.uint8(2**bits - 1)
    return runs.reshape(*stored.shape[:-1], -1)


def _shifts(bits: int) -> Array:
    return np.arange(0, 8, bits, dtype=np.uint8)[:, None]


def joined(*parts: Array) -> Array:
    """Join the bytes of blocks ``[out, blocks, ...]`` to rows ``[out, bytes]``."""
    return np.concatenate(parts, axis=-1).reshape(parts[0].shape[0], -1)


def float16(numbers: Array) -> Array:
    """Return the bytes ``[..., 2]`` of numbers ``[...]`` that float16 holds."""
    stored = numbers.astype(np.float16)
    assert np.array_equal(stored.astype(np.float32), numbers), "training rounds to float16"
    return stored[..., None].view(np.uint8)


def read_float16(stored: Array) -> Array:
    """Return the numbers ``[..., n]`` of bytes ``[..., 2 n]`` in float32."""
    return np.ascontiguousarray(stored).view(np.float16).astype(np.float32)
