"""Kinds of torch functions, by how a runtime's integer kernels execute them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[..., Any]

CONV, LINEAR, ADD, MUL, CAT, POOL, RELU, SIGMOID, ACTIVATION, RESIZE, SAME, OTHER = (
    "conv", "linear", "add", "mul", "cat", "pool", "relu", "sigmoid", "activation", "resize", "same", "other"
)  # fmt: skip
"""Kinds of operations. ADD to POOL and SIGMOID have integer kernels if inputs and output are quantized. RELU is fused
into the preceding integer kernel. ACTIVATION is elementwise and stays in floating point. SAME keeps the values, and
RESIZE may interpolate between them.
"""

_OF: dict[str, list[Any]] = {
    ADD: [torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__],
    MUL: [torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__],
    CAT: [torch.cat, torch.concat, torch.concatenate],
    POOL: [F.adaptive_avg_pool2d, F.avg_pool2d, torch.mean, Tensor.mean],
    RELU: [F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.hardtanh, torch.clamp_min],
    SIGMOID: [torch.sigmoid, Tensor.sigmoid, F.sigmoid],
    ACTIVATION: [
        F.hardswish, F.hardsigmoid, F.silu, F.gelu, F.leaky_relu, F.elu, F.selu, F.mish, F.softplus, F.prelu,
        torch.prelu, torch.tanh, Tensor.tanh, F.tanh,
    ],
    RESIZE: [F.interpolate],
    SAME: [
        F.max_pool2d, torch.max_pool2d, F.dropout, F.dropout2d, F.pad, F.pixel_shuffle, torch.pixel_shuffle,
        torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view, Tensor.permute, torch.permute,
        Tensor.transpose, torch.transpose, Tensor.squeeze, torch.squeeze, Tensor.unsqueeze, torch.unsqueeze,
        Tensor.chunk, torch.chunk, Tensor.split, torch.split, Tensor.unbind, torch.unbind, Tensor.expand,
        Tensor.contiguous, Tensor.detach, Tensor.to, Tensor.float, Tensor.__getitem__,
    ],
}  # fmt: skip
KINDS: dict[Function, str] = {function: kind for kind, functions in _OF.items() for function in functions}
_SAME_NAMES = ("boolean_dispatch", "fn", "_max_pool2d", "max_pool2d", "_max_pool2d_with_indices")
"""Names of the functions that torch's max-pooling dispatchers call."""

INTEGER = frozenset((ADD, MUL, CAT, POOL, SIGMOID))
"""Kinds, other than layers, that have an integer kernel."""


def kind_of(function: Function) -> str | None:
    """Return the kind of a torch function, or None if it is unknown.

    Example:
        >>> kind_of(torch.add), kind_of(torch.fft.fft)
        ('add', None)
    """
    found = KINDS.get(function)
    return found if found is not None or getattr(function, "__name__", "") not in _SAME_NAMES else SAME
