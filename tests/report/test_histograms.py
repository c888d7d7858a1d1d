"""Histograms of weights on their grid equal those of numpy."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from qatkit import QuantSpec, prepare_qat
from qatkit.quantization.measure import layer_table
from qatkit.quantization.prepare import qat_layers
from qatkit.report.histograms import INSIDE, OUTSIDE, weight_histograms
from qatkit.report.layer_figures import clipped_fraction

SPECS = [
    QuantSpec(num_bits=4, observer="lsq"),
    QuantSpec(num_bits=2, observer="mse", strategy="group", group_size=16),
    QuantSpec(num_bits=8, symmetric=False, strategy="tensor"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.num_bits} bits per {spec.strategy}")
def test_bins_are_those_of_numpy_in_units_of_each_slice_s_scale(spec: QuantSpec) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    prepare_qat(model, weight=spec)
    (_, layer), *_ = qat_layers(model)
    assert layer.weight_fake_quant is not None
    scale, zero_point = layer.weight_fake_quant.qparams(layer.weight)
    groups = 64 // (spec.group_size or 64)
    slices = layer.weight.detach().numpy().reshape(32, groups, -1)
    scales, zeros = (part.detach().numpy().reshape(-1, part.shape[-1], 1) for part in (scale, zero_point))
    place = slices / scales + zeros
    width = (spec.qmax - spec.qmin + 1) / INSIDE
    edges = spec.qmin - 0.5 + width * np.arange(-OUTSIDE, INSIDE + OUTSIDE + 1)
    expected, _ = np.histogram(np.clip(place, edges[0], edges[-1]), edges)
    found = weight_histograms(model)["0"]
    assert found["counts"] == expected.tolist()
    assert sum(found["counts"]) == 64 * 32
    assert clipped_fraction(found) == pytest.approx(layer_table(model)[0].clip_rate)


def test_layers_whose_weights_are_not_quantized_have_no_grid() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    prepare_qat(model, activation=QuantSpec(num_bits=8, strategy="token", symmetric=False))
    assert weight_histograms(model) == {}
