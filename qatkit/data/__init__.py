"""Data factories: functions that return a `LightningDataModule` of batches."""

from qatkit.data.causal import causal_text
from qatkit.data.chat import chat
from qatkit.data.classification import text_classification
from qatkit.data.datamodule import SplitDataModule
from qatkit.data.digits import digits
from qatkit.data.masked import masked_text
from qatkit.data.pairs import text_pairs
from qatkit.data.source import Source
from qatkit.data.stdlib import stdlib_text, text_windows
from qatkit.data.text import TextDataModule

__all__ = [
    "Source",
    "SplitDataModule",
    "TextDataModule",
    "causal_text",
    "chat",
    "digits",
    "masked_text",
    "stdlib_text",
    "text_classification",
    "text_pairs",
    "text_windows",
]
