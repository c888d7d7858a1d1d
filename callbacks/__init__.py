"""Callbacks for any Lightning Trainer; installed as `qatkit.callbacks`."""

from qatkit.callbacks.distillation import KnowledgeDistillation
from qatkit.callbacks.features import AttentionMatch, HiddenMatch
from qatkit.callbacks.finite import NonFiniteSteps
from qatkit.callbacks.generation import Generation
from qatkit.callbacks.loading import load_quantized
from qatkit.callbacks.lora import LoRA
from qatkit.callbacks.monitor import CompressionMonitor
from qatkit.callbacks.movement import MovementPruning
from qatkit.callbacks.one_shot import OneShotPruning
from qatkit.callbacks.pruning import ConstantPruning, MagnitudePruning
from qatkit.callbacks.quantization import QuantizationAwareTraining
from qatkit.callbacks.rewinding import WeightRewinding
from qatkit.callbacks.samples import TextSamples
from qatkit.callbacks.srste import SparseRefinedSTE

__all__ = [
    "AttentionMatch",
    "CompressionMonitor",
    "ConstantPruning",
    "Generation",
    "HiddenMatch",
    "KnowledgeDistillation",
    "LoRA",
    "MagnitudePruning",
    "MovementPruning",
    "NonFiniteSteps",
    "OneShotPruning",
    "QuantizationAwareTraining",
    "SparseRefinedSTE",
    "TextSamples",
    "WeightRewinding",
    "load_quantized",
]
