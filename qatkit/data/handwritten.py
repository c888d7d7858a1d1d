"""The handwritten digits dataset of scikit-learn: 1797 grayscale images of 8x8 pixels, included in its package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.utils.data import TensorDataset

from qatkit.data.source import check_fractions
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.data.datamodule import SplitDataModule


def digits(
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    batch_size: int = 64,
    seed: int = 0,
    size: int = 8,
) -> SplitDataModule:
    """Load the digits as ``[1, size, size]`` images in [0, 1] with stratified training, validation and test splits.

    Args:
        val_fraction: Fraction of all images that is held out for validation.
        test_fraction: Fraction of all images that is held out for the reported metrics.
        split_seed: Seed for the assignment of images to splits.
        batch_size: Samples per device per step.
        seed: Determines the training order.
        size: Height and width in pixels; sizes other than the original 8 are interpolated.

    Raises:
        QatkitError: scikit-learn is not installed, the fractions leave no training images, or `size` is below 1.
    """
    from qatkit.data.datamodule import SplitDataModule

    check_fractions(val_fraction, test_fraction, example=0.2)
    if size < 1:
        raise QatkitError(f"{size} is out of range", key="size", advice="use a positive integer")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise QatkitError(
            "scikit-learn, which provides the digits, is not installed",
            key="data.factory",
            advice="run: pip install 'qatkit[demo]'",
        ) from error
    images, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(range(len(labels)), test_size=test_fraction, stratify=labels, random_state=split_seed)
    fraction = val_fraction / (1 - test_fraction)
    train, val = train_test_split(rest, test_size=fraction, stratify=labels[rest], random_state=split_seed)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    if size != 8:
        x = functional.interpolate(x, (size, size), mode="bilinear", antialias=True)
    y = torch.tensor(labels, dtype=torch.long)

    def pick(rows: Any) -> TensorDataset:
        return TensorDataset(x[rows], y[rows])

    return SplitDataModule(pick(train), pick(val), pick(test), batch_size=batch_size, seed=seed, task="classification")


digits.task = "classification"  # type: ignore[attr-defined]  # read by `qatkit.tasks.declared_task`
