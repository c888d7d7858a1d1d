"""Data factories: functions that return a `LightningDataModule` of batches."""

from qatkit.data.datamodule import SplitDataModule
from qatkit.data.digits import digits

__all__ = ["SplitDataModule", "digits"]
