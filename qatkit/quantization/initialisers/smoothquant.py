"""SmoothQuant: move what makes activations hard to quantize into the weights."""

from __future__ import annotations

import torch
from torch import Tensor


def smoothquant_scales(activation_absmax: Tensor, weight_absmax: Tensor, alpha: float = 0.5) -> Tensor:
    """What inputs are divided by, and the weight's columns multiplied with.

    Xiao et al., 2022, https://arxiv.org/abs/2211.10438, equation 4: ``max|X|^alpha / max|W|^(1 - alpha)``. An input
    that is always zero, or a column that is, keeps scale 1.

    Args:
        activation_absmax: Largest magnitude of every input, ``[in]``.
        weight_absmax: Largest magnitude of every input's weights, over all layers that read it, ``[in]``.
        alpha: How much of the difficulty moves: 0 evens out the weights, 1 the activations.

    Returns:
        float32 ``[in]``, all positive.

    Example:
        >>> smoothquant_scales(torch.tensor([8.0, 2.0, 0.0]), torch.tensor([0.5, 0.5, 0.5])).tolist()
        [4.0, 2.0, 1.0]
    """
    activation_absmax, weight_absmax = activation_absmax.float(), weight_absmax.float()
    scales = activation_absmax.pow(alpha) / weight_absmax.pow(1 - alpha)
    alive = (activation_absmax > 0) & (weight_absmax > 0)
    return torch.where(alive, scales, 1.0)
