"""Model factories: functions that return a plain `nn.Module`."""

from qatkit.models.language import llama
from qatkit.models.pretrained import causal_lm, embedding_model, masked_lm, sequence_classifier
from qatkit.models.vision import cnn, mlp

__all__ = ["causal_lm", "cnn", "embedding_model", "llama", "masked_lm", "mlp", "sequence_classifier"]
