"""qatkit: training-time compression of PyTorch models. What you train is what you ship.

Importing it loads nothing heavy: each name below loads its module when it is first used, so that a recipe can be read
and checked before torch is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.schemes import Scheme, scheme
from qatkit.spec import QuantSpec

if TYPE_CHECKING:
    from qatkit.pruning.masks import magnitude_mask, nm_mask
    from qatkit.pruning.schedule import Ramp
    from qatkit.quantization.arithmetic import choose_qparams, dequantize, fake_quantize, quantize
    from qatkit.quantization.calibrate import calibrate
    from qatkit.quantization.ptq.runner import initialise
    from qatkit.quantization.layers import QATConv1d, QATConv2d, QATEmbedding, QATLinear
    from qatkit.quantization.modules import FakeQuantize
    from qatkit.quantization.prepare import prepare_qat, strip_qat

__version__ = "0.1.0"

__all__ = [
    "FakeQuantize",
    "QATConv1d",
    "QATConv2d",
    "QATEmbedding",
    "QATLinear",
    "QatkitError",
    "QatkitWarning",
    "QuantSpec",
    "Ramp",
    "Scheme",
    "calibrate",
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "initialise",
    "magnitude_mask",
    "nm_mask",
    "prepare_qat",
    "quantize",
    "scheme",
    "strip_qat",
]

_HOMES = {
    "qatkit.pruning.masks": ("magnitude_mask", "nm_mask"),
    "qatkit.pruning.schedule": ("Ramp",),
    "qatkit.quantization.arithmetic": ("choose_qparams", "dequantize", "fake_quantize", "quantize"),
    "qatkit.quantization.calibrate": ("calibrate",),
    "qatkit.quantization.ptq.runner": ("initialise",),
    "qatkit.quantization.layers": ("QATConv1d", "QATConv2d", "QATEmbedding", "QATLinear"),
    "qatkit.quantization.modules": ("FakeQuantize",),
    "qatkit.quantization.prepare": ("prepare_qat", "strip_qat"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'qatkit' has no attribute '{name}'")
