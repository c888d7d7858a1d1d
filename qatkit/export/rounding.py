"""Measure the effect of float32 rounding on a quantized model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qatkit.quantization.prepare import fake_quantizers

NOISE = 2.0**-23
"""Relative error of a value before it is rounded to codes, one unit in the last place of float32: a runtime multiplies
sums by scales in a different order than training.
"""


def with_rounding(model: nn.Module) -> nn.Module:
    """Return a float64 copy in which every input of a quantizer has a random relative error of up to `NOISE`.

    A value near a rounding boundary may therefore get an adjacent code. Where such changes spread from layer to layer,
    two exact implementations differ by much more than float32 noise; this model shows by how much.

    Args:
        model: A calibrated model.
    """
    precise = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)

    def noisy(quantize: Callable[[Tensor], tuple[Tensor, Tensor | None]]) -> Callable[[Tensor], object]:
        def call(x: Tensor) -> object:
            return quantize(x * (1 + NOISE * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1)))

        return call

    for _, fake_quant in fake_quantizers(precise):
        if fake_quant.role == "activation":
            # layers call this method of a quantizer, not the module, so that a hook would miss them
            fake_quant.with_scale = noisy(fake_quant.with_scale)  # type: ignore[method-assign, assignment]
    return precise
