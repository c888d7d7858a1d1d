"""Histograms of weights on their quantization grid.

Every channel or group has its own scale, so weights are divided by it: ``w / scale + zero_point``. In these units, all
grids consist of the integers from qmin to qmax, and weights beyond them are clipped.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import nn

from qatkit.quantization.arithmetic import exact_codes
from qatkit.quantization.modules import full_tensor
from qatkit.quantization.prepare import quantized_weights

INSIDE = 64
"""Bins over the range of the codes: a power of two, so that code boundaries are bin boundaries (2 to 6 bits)."""
OUTSIDE = 4
"""Bins on either side of the range; the outermost ones also count everything beyond them."""


class Histogram(TypedDict):
    """The weights of one layer by their position on the grid."""

    bits: int
    qmin: float
    qmax: float
    """The codes are ``qmin .. qmax``; the inner bins cover ``qmin - 0.5`` to ``qmax + 0.5``."""
    integer: bool
    """Whether the codes are the integers from `qmin` to `qmax`, rather than small floats."""
    counts: list[int]
    """`OUTSIDE` bins below the range, `INSIDE` bins within it and `OUTSIDE` bins above it, all of equal width."""


@torch.no_grad()
def weight_histograms(model: nn.Module) -> dict[str, Histogram]:
    """Count the latent weights of every layer with a quantized weight, one layer at a time.

    Args:
        model: A model from `prepare_qat` with initialized scales.
    """
    histograms = {}
    for name, sharded, fake_quant in quantized_weights(model):
        spec, weight = fake_quant.spec, full_tensor(sharded).float()
        scale, zero_point = fake_quant.whole_qparams(weight)
        place = exact_codes(weight, scale, zero_point, spec)
        width = (spec.qmax - spec.qmin + 1) / INSIDE
        bins = ((place - (spec.qmin - 0.5)) / width).floor().clamp(-OUTSIDE, INSIDE + OUTSIDE - 1).long() + OUTSIDE
        counts = torch.bincount(bins.flatten(), minlength=INSIDE + 2 * OUTSIDE)
        histograms[name] = Histogram(
            bits=spec.num_bits, qmin=spec.qmin, qmax=spec.qmax, integer=not spec.is_float, counts=counts.tolist()
        )
    return histograms
