"""qatkit: training-time compression of PyTorch models. What you train is what you ship.

Importing qatkit is cheap: each name below loads its module on first use, so a recipe can be checked without importing
torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qatkit.common.lazy import lazy_exports

if TYPE_CHECKING:
    from qatkit.errors import QatkitError as QatkitError
    from qatkit.errors import QatkitWarning as QatkitWarning
    from qatkit.export.exporting import export_model as export_model
    from qatkit.pruning.masks import magnitude_mask as magnitude_mask
    from qatkit.pruning.masks import nm_mask as nm_mask
    from qatkit.pruning.schedule import Ramp as Ramp
    from qatkit.quantization.arithmetic import dequantize as dequantize
    from qatkit.quantization.arithmetic import fake_quantize as fake_quantize
    from qatkit.quantization.arithmetic import quantize as quantize
    from qatkit.quantization.calibration import calibrate as calibrate
    from qatkit.quantization.layers import QATConv1d as QATConv1d
    from qatkit.quantization.layers import QATConv2d as QATConv2d
    from qatkit.quantization.layers import QATEmbedding as QATEmbedding
    from qatkit.quantization.layers import QATLinear as QATLinear
    from qatkit.quantization.modules import FakeQuantize as FakeQuantize
    from qatkit.quantization.prepare import prepare_qat as prepare_qat
    from qatkit.quantization.prepare import strip_qat as strip_qat
    from qatkit.quantization.ptq.runner import apply_ptq as apply_ptq
    from qatkit.quantization.scales import choose_qparams as choose_qparams
    from qatkit.schemes import Scheme as Scheme
    from qatkit.schemes import scheme as scheme
    from qatkit.spec import QuantSpec as QuantSpec
    from qatkit.trials.searching import search as search

__version__ = "0.1.0"

_HOMES = {
    "qatkit.errors": ["QatkitError", "QatkitWarning"],
    "qatkit.schemes": ["Scheme", "scheme"],
    "qatkit.spec": ["QuantSpec"],
    "qatkit.export.exporting": ["export_model"],
    "qatkit.pruning.masks": ["magnitude_mask", "nm_mask"],
    "qatkit.pruning.schedule": ["Ramp"],
    "qatkit.quantization.arithmetic": ["dequantize", "fake_quantize", "quantize"],
    "qatkit.quantization.calibration": ["calibrate"],
    "qatkit.quantization.layers": ["QATConv1d", "QATConv2d", "QATEmbedding", "QATLinear"],
    "qatkit.quantization.modules": ["FakeQuantize"],
    "qatkit.quantization.prepare": ["prepare_qat", "strip_qat"],
    "qatkit.quantization.ptq.runner": ["apply_ptq"],
    "qatkit.quantization.scales": ["choose_qparams"],
    "qatkit.trials.searching": ["search"],
}
__all__, __getattr__, __dir__ = lazy_exports(__name__, _HOMES)  # lazy_exports returns a list
