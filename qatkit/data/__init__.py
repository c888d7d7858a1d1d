"""Data factories: functions that return a `LightningDataModule`. Each is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qatkit.common.lazy import lazy_exports

if TYPE_CHECKING:
    from qatkit.data.causal import causal_text as causal_text
    from qatkit.data.classification import text_classification as text_classification
    from qatkit.data.conversations import chat as chat
    from qatkit.data.datamodule import SplitDataModule as SplitDataModule
    from qatkit.data.detection import image_detection as image_detection
    from qatkit.data.handwritten import digits as digits
    from qatkit.data.images import image_classification as image_classification
    from qatkit.data.images import image_multilabel as image_multilabel
    from qatkit.data.images import image_segmentation as image_segmentation
    from qatkit.data.masked import masked_text as masked_text
    from qatkit.data.pairs import text_pairs as text_pairs
    from qatkit.data.recordings import audio_classification as audio_classification
    from qatkit.data.source import Source as Source
    from qatkit.data.stdlib import stdlib_text as stdlib_text
    from qatkit.data.stdlib import text_windows as text_windows
    from qatkit.data.table import table_classification as table_classification
    from qatkit.data.table import table_regression as table_regression
    from qatkit.data.text_datamodule import TextDataModule as TextDataModule
    from qatkit.data.token_datamodule import TokenDataModule as TokenDataModule

_HOMES = {
    "qatkit.data.causal": ["causal_text"],
    "qatkit.data.conversations": ["chat"],
    "qatkit.data.classification": ["text_classification"],
    "qatkit.data.datamodule": ["SplitDataModule"],
    "qatkit.data.detection": ["image_detection"],
    "qatkit.data.handwritten": ["digits"],
    "qatkit.data.images": ["image_classification", "image_multilabel", "image_segmentation"],
    "qatkit.data.masked": ["masked_text"],
    "qatkit.data.pairs": ["text_pairs"],
    "qatkit.data.recordings": ["audio_classification"],
    "qatkit.data.source": ["Source"],
    "qatkit.data.stdlib": ["stdlib_text", "text_windows"],
    "qatkit.data.table": ["table_classification", "table_regression"],
    "qatkit.data.text_datamodule": ["TextDataModule"],
    "qatkit.data.token_datamodule": ["TokenDataModule"],
}
__all__, __getattr__, __dir__ = lazy_exports(__name__, _HOMES)  # lazy_exports returns a list
