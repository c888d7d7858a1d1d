"""Slices, which are the parts of a tensor with a common scale, and the shapes of scales.

Scales are stored in the shapes of compressed-tensors: per-tensor ``[1]``, per-channel ``[out, 1]``, per-group ``[out,
groups]``, per-block ``[row blocks, column blocks]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor
from torch.nn import functional as F

from qatkit.quantization.scale_dtypes import SUPER_BLOCK
from qatkit.spec import QuantSpec


def to_slices(x: Tensor, spec: QuantSpec) -> Tensor:
    """View `x` so that a scale broadcasts over its slice.

    Args:
        x: A weight ``[out, ...]``, or an activation of any shape.
        spec: Its quantization.

    Returns:
        A view ``[..., groups, group_size]`` for strategy "group"; a tensor ``[row blocks, rows, column blocks,
        columns]``, zero-padded at the edges, for strategy "block"; otherwise ``x`` itself.
    """
    if spec.group_size is not None:
        return x.reshape(*x.shape[:-1], x.shape[-1] // spec.group_size, spec.group_size)
    if spec.block_structure is not None:
        rows, columns = spec.block_structure
        x = F.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
        return x.view(x.shape[0] // rows, rows, x.shape[1] // columns, columns)
    return x


def from_slices(slices: Tensor, shape: torch.Size, spec: QuantSpec) -> Tensor:
    """Return the tensor from `to_slices` in its original shape."""
    if spec.block_structure is not None:
        slices = slices.reshape(slices.shape[0] * slices.shape[1], -1)[: shape[0], : shape[1]]
    return slices.reshape(shape)


def aligned(scale: Tensor, x: Tensor, spec: QuantSpec) -> Tensor:
    """Reshape a stored scale (or zero point) so that it broadcasts over ``to_slices(x, spec)``."""
    if spec.strategy == "channel":
        return scale.view(-1, *[1] * (x.dim() - 1))
    if spec.strategy == "block":
        return scale[:, None, :, None]
    return scale.unsqueeze(-1) if spec.strategy == "group" else scale


def value_range(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest values of every slice, in the stored scale's shape."""
    x = x.detach()
    if spec.strategy == "tensor":
        low, high = torch.aminmax(x)
        return low.float().view(1), high.float().view(1)
    if spec.strategy == "channel":
        low, high = _extremes(x.flatten(1), keepdim=True)
    elif spec.strategy == "group":
        low, high = _extremes(to_slices(x, spec))
    elif spec.strategy == "block":
        low, high = _extremes(to_slices(x, spec).transpose(1, 2).flatten(2))
    elif spec.strategy == "token":  # the last dimension is one token
        low, high = _extremes(x, keepdim=True)
    else:
        assert_never(spec.strategy)
    return low.float(), high.float()


def _extremes(x: Tensor, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The smallest and largest values along the last dimension."""
    if x.device.type == "cpu":  # torch vectorizes these two here, but not aminmax
        return x.amin(-1, keepdim), x.amax(-1, keepdim)
    low, high = torch.aminmax(x, dim=-1, keepdim=keepdim)
    return low, high


def scale_shape(shape: Sequence[int], spec: QuantSpec) -> tuple[int, ...]:
    """Return the stored scale's shape for a weight ``[out, in, ...]`` of the given shape.

    Example:
        >>> scale_shape([8, 64], QuantSpec(num_bits=4, strategy="group", group_size=32))
        (8, 2)
    """
    if spec.strategy == "tensor":
        return (1,)
    if spec.block_structure is not None:
        rows, columns = spec.block_structure
        return (-(-shape[0] // rows), -(-shape[1] // columns))
    return (shape[0], 1 if spec.group_size is None else shape[1] // spec.group_size)


def outer_shape(shape: Sequence[int], spec: QuantSpec) -> tuple[int, ...]:
    """Return the shape of the outer scale for two-level scales of the given shape.

    It is ``[1]`` per tensor; per super-block, ``[out, super-blocks, 1]`` or, with the scale of the minima,
    ``[out, super-blocks, 2]``.

    Example:
        >>> from qatkit import scheme
        >>> outer_shape([8, 32], scheme("Q4_K").weight)
        (8, 4, 2)
    """
    if not spec.super_blocks:
        return (1,)
    assert spec.group_size is not None
    return (shape[0], shape[1] * spec.group_size // SUPER_BLOCK, 2 if spec.has_minimum else 1)
