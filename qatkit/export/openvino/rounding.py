"""Measure the effect of OpenVINO's rounding on a quantized model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qatkit.export.rounding import NOISE
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.prepare import fake_quantizers


def with_openvino_rounding(model: nn.Module) -> nn.Module:
    """Return a float64 copy whose activations are rounded as OpenVINO's FakeQuantize does.

    Training computes ``round(x / scale) + zero_point``; OpenVINO multiplies by the reciprocal of the scale and adds the
    zero point before it rounds. A value halfway between two codes may therefore get the other one, always in the same
    direction. Such values are common in data with few distinct values, such as pixels with 17 gray levels. Half of the
    values also have a random relative error, as in `qatkit.export.rounding.with_rounding`, because sums are computed in
    a different order.

    Args:
        model: A calibrated model with static activation scales.
    """
    precise = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Tensor) -> Tensor:
        error, chosen = (torch.rand(x.shape, generator=generator, dtype=x.dtype) for _ in range(2))
        return x * (1 + NOISE * (2 * error - 1) * (chosen < 0.5))

    def rounding(
        fake_quant: FakeQuantize, quantize: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    ) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        return lambda x: quantize(openvino_grid(noisy(x), fake_quant))

    for _, fake_quant in fake_quantizers(precise):
        if fake_quant.role == "activation":
            # layers call this method of a quantizer, not the module, so that a hook would miss them
            fake_quant.with_scale = rounding(fake_quant, fake_quant.with_scale)  # type: ignore[method-assign, assignment]
    return precise


def openvino_grid(x: Tensor, fake_quant: FakeQuantize) -> Tensor:
    """Round values to the grid of a static per-tensor quantizer with the float32 arithmetic of FakeQuantize.

    Args:
        x: Values in any floating-point dtype, which is also the dtype of the result.
        fake_quant: The quantizer of an activation.
    """
    scale, zero_point = (value.float() for value in fake_quant.qparams(torch.empty(0)))
    first = -128 if fake_quant.spec.symmetric else 0
    low, high = (first - zero_point) * scale, (first + 255 - zero_point) * scale
    step = torch.full_like(scale, 255) / (high - low)  # a number divided by a tensor would be a product
    codes = (x.float().clamp(low, high) * step - low * step).round() + first
    return (codes - zero_point).to(x.dtype) * scale.to(x.dtype)
