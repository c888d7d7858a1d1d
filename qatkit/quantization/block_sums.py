"""Block sums of inputs, which llama.cpp rounds to float16 for weights with a minimum (Q4_1, Q5_1).

With codes q, scale d and minimum m of a block, its weights are ``d q + m``, and its product with the inputs is
``d sum(q x) + m sum(x)``. llama.cpp stores ``sum(x)`` beside the codes of the inputs, as a float16 number (q8_1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.slices import to_slices


def rounds_sums(weights: FakeQuantize, inputs: FakeQuantize) -> bool:
    """Whether a layer with these quantizers computes with rounded block sums."""
    return (
        inputs.spec.late_scales
        and weights.spec.scale_rule == "minimum"
        and weights.spec.group_size == inputs.spec.group_size
    )


def with_rounded_sums(
    x: Tensor, input_scale: Tensor, weights: FakeQuantize, latent: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """Append the errors of the block sums to an input, and the minima of the blocks to a weight.

    The product of the results contains the rounded sums. The gradient ignores them (straight-through).

    Args:
        x: The fake-quantized input ``[..., in]``.
        input_scale: Its scales ``[..., blocks]`` before they are rounded to float16.
        weights: The quantizer of the weight.
        latent: The unquantized weight ``[out, in]``.
        matrix: The fake-quantized weight ``[out, in]``.

    Returns:
        An input ``[..., in + blocks]`` and a weight ``[out, in + blocks]``, in their dtypes.
    """
    with torch.no_grad():
        scale, zero_point = weights.qparams(latent)
        sums = to_slices(x.float(), weights.spec).sum(-1)
        codes = (sums / input_scale.half().float()).round()
        errors = (codes * input_scale).half().float() - sums
        minima = -scale * zero_point
    return torch.cat([x, errors.to(x.dtype)], dim=-1), torch.cat([matrix, minima.to(matrix.dtype)], dim=-1)
