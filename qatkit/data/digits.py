"""scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels that come with the package."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import TensorDataset

from qatkit.data.datamodule import SplitDataModule
from qatkit.errors import QatkitError


def digits(
    val_fraction: float = 0.1, test_fraction: float = 0.2, split_seed: int = 0, batch_size: int = 64, seed: int = 0
) -> SplitDataModule:
    """The digits as ``[1, 8, 8]`` images in [0, 1], split so that every split has every digit in the same proportion.

    Args:
        val_fraction: Share of all images held out for validation.
        test_fraction: Share of all images held out for the reported numbers.
        split_seed: Decides which image goes where.
        batch_size: Samples per device and step.
        seed: Decides the training order.

    Raises:
        QatkitError: scikit-learn is not installed, or the shares leave nothing to train on.
    """
    if not 0 < val_fraction < 1 or not 0 < test_fraction < 1 or val_fraction + test_fraction >= 1:
        raise QatkitError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} must be above 0 and leave something to "
            "train on; write 0.1 and 0.2"
        )
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise QatkitError("the digits come with scikit-learn: pip install 'qatkit[demo]'") from error
    images, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(range(len(labels)), test_size=test_fraction, stratify=labels, random_state=split_seed)
    share = val_fraction / (1 - test_fraction)
    train, val = train_test_split(rest, test_size=share, stratify=labels[rest], random_state=split_seed)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, dtype=torch.long)

    def pick(rows: Any) -> TensorDataset:
        return TensorDataset(x[rows], y[rows])

    return SplitDataModule(pick(train), pick(val), pick(test), batch_size=batch_size, seed=seed, task="classification")


digits.task = "classification"  # type: ignore[attr-defined]  # read by `qatkit.tasks.declared_task`
