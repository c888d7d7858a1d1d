"""Model factories: functions that return a plain `nn.Module`."""

from qatkit.models.language import causal_lm, llama
from qatkit.models.vision import cnn, mlp

__all__ = ["causal_lm", "cnn", "llama", "mlp"]
