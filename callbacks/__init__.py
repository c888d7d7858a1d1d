"""Callbacks for any Lightning Trainer, installed as `qatkit.callbacks`; modules are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qatkit.common.lazy import lazy_exports

if TYPE_CHECKING:
    from qatkit.callbacks.distillation import KnowledgeDistillation as KnowledgeDistillation
    from qatkit.callbacks.features import AttentionMatch as AttentionMatch
    from qatkit.callbacks.features import HiddenMatch as HiddenMatch
    from qatkit.callbacks.generation import Generation as Generation
    from qatkit.callbacks.loading import load_quantized as load_quantized
    from qatkit.callbacks.lora import LoRA as LoRA
    from qatkit.callbacks.monitor import CompressionMonitor as CompressionMonitor
    from qatkit.callbacks.movement import MovementPruning as MovementPruning
    from qatkit.callbacks.non_finite import NonFiniteSteps as NonFiniteSteps
    from qatkit.callbacks.one_shot import OneShotPruning as OneShotPruning
    from qatkit.callbacks.pruning import ConstantPruning as ConstantPruning
    from qatkit.callbacks.pruning import MagnitudePruning as MagnitudePruning
    from qatkit.callbacks.quantization import QuantizationAwareTraining as QuantizationAwareTraining
    from qatkit.callbacks.rewinding import WeightRewinding as WeightRewinding
    from qatkit.callbacks.samples import TextSamples as TextSamples
    from qatkit.callbacks.srste import SparseRefinedSTE as SparseRefinedSTE

_HOMES = {
    "qatkit.callbacks.distillation": ["KnowledgeDistillation"],
    "qatkit.callbacks.features": ["AttentionMatch", "HiddenMatch"],
    "qatkit.callbacks.non_finite": ["NonFiniteSteps"],
    "qatkit.callbacks.generation": ["Generation"],
    "qatkit.callbacks.loading": ["load_quantized"],
    "qatkit.callbacks.lora": ["LoRA"],
    "qatkit.callbacks.monitor": ["CompressionMonitor"],
    "qatkit.callbacks.movement": ["MovementPruning"],
    "qatkit.callbacks.one_shot": ["OneShotPruning"],
    "qatkit.callbacks.pruning": ["ConstantPruning", "MagnitudePruning"],
    "qatkit.callbacks.quantization": ["QuantizationAwareTraining"],
    "qatkit.callbacks.rewinding": ["WeightRewinding"],
    "qatkit.callbacks.samples": ["TextSamples"],
    "qatkit.callbacks.srste": ["SparseRefinedSTE"],
}
__all__, __getattr__, __dir__ = lazy_exports(__name__, _HOMES)  # lazy_exports returns a list
