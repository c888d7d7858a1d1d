"""Model factories: functions that return a plain `nn.Module`."""

from qatkit.models.language import llama
from qatkit.models.vision import cnn, mlp

__all__ = ["cnn", "llama", "mlp"]
