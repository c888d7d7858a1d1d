"""Data factories: functions that return a `LightningDataModule` of batches."""

from qatkit.data.datamodule import SplitDataModule
from qatkit.data.digits import digits
from qatkit.data.stdlib import stdlib_text, text_windows
from qatkit.data.text import TextDataModule

__all__ = ["SplitDataModule", "TextDataModule", "digits", "stdlib_text", "text_windows"]
