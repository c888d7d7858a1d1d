"""qatkit: training-time compression of PyTorch models. What you train is what you ship.

Importing it loads torch and nothing else; Lightning, transformers and the runtimes load where they are used.
"""

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.quantization.arithmetic import choose_qparams, dequantize, fake_quantize, quantize
from qatkit.quantization.calibrate import calibrate
from qatkit.quantization.modules import FakeQuantize, QATConv2d, QATLinear
from qatkit.quantization.prepare import prepare_qat, strip_qat
from qatkit.spec import QuantSpec

__version__ = "0.1.0"

__all__ = [
    "FakeQuantize",
    "QATConv2d",
    "QATLinear",
    "QatkitError",
    "QatkitWarning",
    "QuantSpec",
    "calibrate",
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "prepare_qat",
    "quantize",
    "strip_qat",
]
