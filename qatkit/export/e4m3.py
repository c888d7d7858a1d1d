"""Positive numbers of the 8-bit float e4m3 as bytes: the scales of NVFP4 in GGUF and MLX."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_CODES = np.arange(127)
_E4M3 = np.where(_CODES < 8, _CODES * 2.0**-9, (8 + (_CODES & 7)) * 2.0 ** ((_CODES >> 3) - 10.0))
"""The positive numbers of e4m3 by their bits; 127 is NaN."""


def e4m3(numbers: Array) -> Array:
    """Return the bytes of numbers that e4m3 holds, which are not negative.

    Example:
        >>> e4m3(np.array([2.0**-9, 1.0, 448.0])).tolist()
        [1, 56, 126]
    """
    stored = np.searchsorted(_E4M3, numbers).clip(0, 126).astype(np.uint8)
    assert np.array_equal(_E4M3[stored], numbers), "training rounds to e4m3"
    return stored


def read_e4m3(stored: Array) -> Array:
    """Return the numbers of bytes in float32."""
    numbers: Array = _E4M3[stored & 127].astype(np.float32)
    return numbers
