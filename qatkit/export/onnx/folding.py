"""Parameters of layers into which the ONNX exporter folds the BatchNorm that follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

ROUNDINGS = {torch.float32: 64, torch.float16: 8}
"""Relative difference that the exporter's arithmetic may cause, in units of the dtype's precision, by dtype."""


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the layers that the exporter may fold: those with running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_var is not None]


def holds_a_fold(stored: np.ndarray[Any, Any], layer: nn.Module, part: str, norms: list[_BatchNorm]) -> bool:
    """Return whether a stored weight or bias is that of a layer with one of the BatchNorm layers folded in.

    Args:
        stored: The values in the file.
        layer: The layer.
        part: "weight" or "bias".
        norms: The candidates.
    """
    value = getattr(layer, part, None)
    if part not in ("weight", "bias") or not isinstance(value, Tensor):
        return False
    groups = layer.groups if isinstance(layer, _ConvTransposeNd) and part == "weight" else 0
    return any(_folded(stored, value, groups, part, norm) for norm in norms)


def _folded(stored: np.ndarray[Any, Any], value: Tensor, groups: int, part: str, norm: _BatchNorm) -> bool:
    """Whether the values are folded; `groups` are those of a transposed weight ``[in, out / groups, ...]``, else 0."""
    if (value.shape[1] * groups if groups else value.shape[0]) != norm.num_features:
        return False
    assert norm.running_var is not None
    assert norm.running_mean is not None
    ones = norm.running_var.new_ones(norm.num_features)
    gamma = (ones if norm.weight is None else norm.weight).double()
    beta = (0 * ones if norm.bias is None else norm.bias).double()
    factor = gamma / (norm.running_var.double() + norm.eps).sqrt()
    if part == "bias":
        expected = (value.double() - norm.running_mean.double()) * factor + beta
        scale = (value.double() - norm.running_mean.double()).abs() * factor.abs() + beta.abs()
    else:
        if groups:
            factor = factor.view(groups, 1, -1).expand(-1, value.shape[0] // groups, -1).flatten(0, 1)
        expected = value.double() * factor.view(*factor.shape, *[1] * (value.dim() - factor.dim()))
        scale = expected.abs()
    tolerance = ROUNDINGS.get(value.dtype, 1) * torch.finfo(value.dtype).eps
    return bool((np.abs(stored - expected.numpy()) <= tolerance * scale.numpy()).all())
