"""How a range becomes a scale, and what calibration watches."""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit.quantization.arithmetic import aligned, blocks, choose_qparams, fake_quantize, value_range
from qatkit.spec import QuantSpec


def minmax_qparams(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point from the smallest and largest value of every slice: nothing is clipped."""
    return choose_qparams(*value_range(x, spec), spec)


def mse_qparams(x: Tensor, spec: QuantSpec, steps: int = 80, smallest: float = 0.2) -> tuple[Tensor, Tensor]:
    """Scale and zero point with the least squared error among ranges shrunk in equal steps.

    Args:
        x: The tensor, any float dtype.
        spec: Its quantization.
        steps: How many ranges are tried, from the full one down.
        smallest: The narrowest range tried, as a share of the full one.

    Returns:
        Scale and zero point in their stored shape, float32.
    """
    x = x.detach().float()
    low, high = value_range(x, spec)
    best_scale, best_zero_point = choose_qparams(low, high, spec)
    best = _squared_error(x, best_scale, best_zero_point, spec)
    for share in torch.linspace(1.0, smallest, steps)[1:].tolist():
        scale, zero_point = choose_qparams(low * share, high * share, spec)
        error = _squared_error(x, scale, zero_point, spec)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
    return best_scale, best_zero_point


def _squared_error(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    error = blocks((fake_quantize(x, scale, zero_point, spec) - x).square(), spec)
    return error.sum_to_size(aligned(scale, x, spec).shape).view(scale.shape)


class RangeObserver:
    """Remembers the smallest and largest activation that passed, as plain float32 tensors of shape ``[1]``."""

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Widen the range by `x`; an empty tensor (an expert that got no token) says nothing."""
        if x.numel() == 0:
            return
        low, high = torch.aminmax(x.detach())
        low, high = low.float().view(1), high.float().view(1)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
