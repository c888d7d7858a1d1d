"""Scales that minimize the weighted squared error of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit.quantization.estimators import mse_qparams
from qatkit.spec import QuantSpec


@torch.no_grad()
def importance(weight: Tensor, hessian: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return the unchanged weight, and the scales with the smallest error, weighted by the mean square of the inputs.

    The weighted error is the output error if the inputs are uncorrelated. The importance matrix of llama.cpp has the
    same numbers.

    Args:
        weight: ``[out, in]``.
        hessian: Mean outer product of the layer's input rows, ``[in, in]``.
        spec: Quantization of the weight.

    Returns:
        The weight, and the result of `mse_qparams`.

    Example:
        >>> from qatkit import scheme
        >>> x, weight, spec = torch.randn(64, 256), torch.randn(4, 256), scheme("Q4_K").weight
        >>> _, scale, minimum = importance(weight, x.t() @ x, spec)
        >>> scale.shape
        torch.Size([4, 8])
    """
    return weight, *mse_qparams(weight, spec, weights=hessian.diagonal().expand_as(weight))
