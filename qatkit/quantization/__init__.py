"""Quantization-aware training: fake quantization, calibration, PTQ and mixed precision.

Importing the package is cheap: each name below loads its module on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qatkit.common.lazy import lazy_exports

if TYPE_CHECKING:
    from qatkit.quantization.arithmetic import dequantize as dequantize
    from qatkit.quantization.arithmetic import fake_quantize as fake_quantize
    from qatkit.quantization.arithmetic import quantize as quantize
    from qatkit.quantization.calibration import calibrate as calibrate
    from qatkit.quantization.elements import ELEMENTS as ELEMENTS
    from qatkit.quantization.estimators import absmean_qparams as absmean_qparams
    from qatkit.quantization.estimators import computed_qparams as computed_qparams
    from qatkit.quantization.estimators import mse_qparams as mse_qparams
    from qatkit.quantization.folding import fold_batchnorm as fold_batchnorm
    from qatkit.quantization.layers import QATConv1d as QATConv1d
    from qatkit.quantization.layers import QATConv2d as QATConv2d
    from qatkit.quantization.layers import QATEmbedding as QATEmbedding
    from qatkit.quantization.layers import QATLayer as QATLayer
    from qatkit.quantization.layers import QATLinear as QATLinear
    from qatkit.quantization.measure import layer_table as layer_table
    from qatkit.quantization.mixed.allocation import allocate as allocate
    from qatkit.quantization.mixed.overrides import allocated_layers as allocated_layers
    from qatkit.quantization.mixed.sensitivity import measure_sensitivity as measure_sensitivity
    from qatkit.quantization.modules import FakeQuantize as FakeQuantize
    from qatkit.quantization.observers import OBSERVERS as OBSERVERS
    from qatkit.quantization.placement.preparation import prepare_for_target as prepare_for_target
    from qatkit.quantization.prepare import fake_quantizers as fake_quantizers
    from qatkit.quantization.prepare import prepare_qat as prepare_qat
    from qatkit.quantization.prepare import qat_layers as qat_layers
    from qatkit.quantization.prepare import quantized_weights as quantized_weights
    from qatkit.quantization.prepare import strip_qat as strip_qat
    from qatkit.quantization.ptq.awq import awq_clip as awq_clip
    from qatkit.quantization.ptq.awq import awq_scales as awq_scales
    from qatkit.quantization.ptq.gptq import gptq as gptq
    from qatkit.quantization.ptq.methods import METHODS as METHODS
    from qatkit.quantization.ptq.runner import apply_ptq as apply_ptq
    from qatkit.quantization.ptq.smoothquant import smoothquant_scales as smoothquant_scales
    from qatkit.quantization.scales import choose_qparams as choose_qparams
    from qatkit.quantization.slices import value_range as value_range
    from qatkit.quantization.state import load_quantizers as load_quantizers
    from qatkit.quantization.state import save_quantizers as save_quantizers
    from qatkit.quantization.targets import TARGETS as TARGETS

_HOMES = {
    "qatkit.quantization.arithmetic": ["dequantize", "fake_quantize", "quantize"],
    "qatkit.quantization.calibration": ["calibrate"],
    "qatkit.quantization.elements": ["ELEMENTS"],
    "qatkit.quantization.estimators": ["absmean_qparams", "computed_qparams", "mse_qparams"],
    "qatkit.quantization.folding": ["fold_batchnorm"],
    "qatkit.quantization.layers": ["QATConv1d", "QATConv2d", "QATEmbedding", "QATLayer", "QATLinear"],
    "qatkit.quantization.measure": ["layer_table"],
    "qatkit.quantization.mixed.allocation": ["allocate"],
    "qatkit.quantization.mixed.overrides": ["allocated_layers"],
    "qatkit.quantization.mixed.sensitivity": ["measure_sensitivity"],
    "qatkit.quantization.modules": ["FakeQuantize"],
    "qatkit.quantization.observers": ["OBSERVERS"],
    "qatkit.quantization.placement.preparation": ["prepare_for_target"],
    "qatkit.quantization.prepare": ["fake_quantizers", "prepare_qat", "qat_layers", "quantized_weights", "strip_qat"],
    "qatkit.quantization.ptq.awq": ["awq_clip", "awq_scales"],
    "qatkit.quantization.ptq.gptq": ["gptq"],
    "qatkit.quantization.ptq.methods": ["METHODS"],
    "qatkit.quantization.ptq.runner": ["apply_ptq"],
    "qatkit.quantization.ptq.smoothquant": ["smoothquant_scales"],
    "qatkit.quantization.scales": ["choose_qparams"],
    "qatkit.quantization.slices": ["value_range"],
    "qatkit.quantization.state": ["load_quantizers", "save_quantizers"],
    "qatkit.quantization.targets": ["TARGETS"],
}
__all__, __getattr__, __dir__ = lazy_exports(__name__, _HOMES)  # lazy_exports returns a list
