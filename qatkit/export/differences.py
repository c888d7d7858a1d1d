"""Describe the differences between a constant in a file and the model's."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def differences(what: str, stored: np.ndarray[Any, Any] | None, expected: Tensor) -> list[str]:
    """Compare a constant to the model's with ``==``, and describe the first difference and the number of differences.

    Args:
        what: What is compared, for the description.
        stored: The constant; None if it is not in the file.
        expected: The model's tensor.

    Returns:
        One description, or none if they are equal.
    """
    if stored is None:
        return [f"{what}: not in the file"]
    if stored.shape != tuple(expected.shape):
        return [f"{what}: shape {list(stored.shape)} in the file, {list(expected.shape)} in the model"]
    model = expected.numpy()
    wrong = stored.astype(np.float64) != model.astype(np.float64)
    if not wrong.any():
        return []
    first = tuple(int(axis[0]) for axis in np.atleast_1d(wrong).nonzero())
    pair = np.atleast_1d(stored)[first], np.atleast_1d(model)[first]
    return [
        f"{what}: {int(wrong.sum())} of {wrong.size} differ, the first at {list(first)}: "
        f"{pair[0]} in the file, {pair[1]} in the model"
    ]
