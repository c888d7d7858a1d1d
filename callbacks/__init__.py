"""Callbacks for any Lightning Trainer; installed as `qatkit.callbacks`."""

from qatkit.callbacks.distillation import KnowledgeDistillation
from qatkit.callbacks.loading import load_quantized
from qatkit.callbacks.monitor import CompressionMonitor
from qatkit.callbacks.quantization import QuantizationAwareTraining

__all__ = ["CompressionMonitor", "KnowledgeDistillation", "QuantizationAwareTraining", "load_quantized"]
