"""Model factories: functions that return a plain `nn.Module`. Each is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qatkit.common.lazy import lazy_exports

if TYPE_CHECKING:
    from qatkit.models.heads import pretrained_model as pretrained_model
    from qatkit.models.heads import untrained_model as untrained_model
    from qatkit.models.language import llama as llama
    from qatkit.models.pretrained import causal_lm as causal_lm
    from qatkit.models.pretrained import embedding_model as embedding_model
    from qatkit.models.pretrained import masked_lm as masked_lm
    from qatkit.models.pretrained import sequence_classifier as sequence_classifier
    from qatkit.models.registries import timm_model as timm_model
    from qatkit.models.registries import torchvision_model as torchvision_model
    from qatkit.models.residual import resnet as resnet
    from qatkit.models.vision import cnn as cnn
    from qatkit.models.vision import mlp as mlp

_HOMES = {
    "qatkit.models.heads": ["pretrained_model", "untrained_model"],
    "qatkit.models.language": ["llama"],
    "qatkit.models.pretrained": ["causal_lm", "embedding_model", "masked_lm", "sequence_classifier"],
    "qatkit.models.registries": ["timm_model", "torchvision_model"],
    "qatkit.models.residual": ["resnet"],
    "qatkit.models.vision": ["cnn", "mlp"],
}
__all__, __getattr__, __dir__ = lazy_exports(__name__, _HOMES)  # lazy_exports returns a list
