"""Layers of a QDQ graph: torch's layers with an integer weight, an input quantizer and an integer bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.export.onnx.qdq_nodes import Codes, DynamicInputQuantizer
from qatkit.quantization.layers import (
    QATConv1d,
    QATConv2d,
    QATConv3d,
    QATConvTranspose1d,
    QATConvTranspose2d,
    QATEmbedding,
    QATEmbeddingBag,
    QATLayer,
    QATLinear,
    QATOutputProjection,
    QATTransposedLinear,
    swapped,
)


class QDQLinear(nn.Linear):
    """A linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        return _linear(self, input)


class QDQTransposedLinear(nn.Module):
    """transformers' `Conv1D`, with the codes of its weight as ``[out, in]``."""

    def forward(self, x: Tensor) -> Tensor:
        return _linear(self, x)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer.input, DynamicInputQuantizer):
        out: Tensor = layer.input(x, layer.weight)
        late = cast("Tensor | None", layer.bias)
    else:
        x, weight, bias, late = _operands(layer, x)
        out = F.linear(x, weight, bias)
    return out if late is None else out + late


class _QDQConv(nn.modules.conv._ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        x, weight, bias, late = _operands(self, input)
        out = cast(Tensor, cast(Any, self)._conv_forward(x, weight, bias))
        return out if late is None else out + _over_positions(late, weight)


class QDQConv1d(_QDQConv, nn.Conv1d):
    """A convolution over sequences."""


class QDQConv2d(_QDQConv, nn.Conv2d):
    """A convolution over images."""


class QDQConv3d(_QDQConv, nn.Conv3d):
    """A convolution over volumes."""


class _QDQConvTranspose(nn.modules.conv._ConvTransposeNd):
    """A transposed convolution, with the codes of its weight as ``[out, in / groups, ...]``, one scale per output."""

    function: Callable[..., Tensor]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        x, weight, bias, late = _operands(self, input)
        sizes: Any = (self.stride, self.padding, self.kernel_size, weight.dim() - 2, self.dilation)
        added = self._output_padding(x, output_size, *sizes)
        stored = swapped(weight, self.groups)
        out = type(self).function(x, stored, bias, self.stride, self.padding, added, self.groups, self.dilation)
        return out if late is None else out + _over_positions(late, weight)


class QDQConvTranspose1d(_QDQConvTranspose, nn.ConvTranspose1d):
    """A transposed convolution over sequences."""

    function = staticmethod(F.conv_transpose1d)


class QDQConvTranspose2d(_QDQConvTranspose, nn.ConvTranspose2d):
    """A transposed convolution over images."""

    function = staticmethod(F.conv_transpose2d)


def _over_positions(bias: Tensor, weight: Tensor) -> Tensor:
    return bias.view(-1, *[1] * (weight.dim() - 2))


class QDQEmbedding(nn.Embedding):
    """An embedding that gathers rows of codes and then decodes them, so that the table keeps integer codes."""

    def forward(self, input: Tensor) -> Tensor:
        return _decoded_rows(cast(Codes, self.weight), input)


class QDQEmbeddingBag(nn.EmbeddingBag):
    """An embedding bag: rows of codes are decoded and reduced over each bag, except those of the padding index."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        rows = _decoded_rows(cast(Codes, self.weight), input)  # [bags, size, width], or [all, width] with offsets
        kept = torch.ones_like(input, dtype=torch.bool) if self.padding_idx is None else input != self.padding_idx
        if offsets is None:
            bags = kept.unsqueeze(1)  # [bags, 1, size]
        else:
            starts = offsets[:-1] if self.include_last_offset else offsets
            bag = (torch.arange(input.shape[0], device=input.device).unsqueeze(1) >= starts).sum(1) - 1
            bags = (bag == torch.arange(starts.shape[0], device=input.device).unsqueeze(1)) & kept  # [bags, all]
        if self.mode == "max":
            low = torch.where(bags.unsqueeze(-1), rows.unsqueeze(-3), -torch.inf).amax(-2)
            reduced = torch.where(bags.any(-1, keepdim=True), low, 0.0)
        else:
            weights = bags.float()
            if per_sample_weights is not None:
                weights = weights * per_sample_weights.unsqueeze(-2)
            reduced = weights @ rows
            if self.mode == "mean":
                reduced = reduced / weights.sum(-1, keepdim=True).clamp(min=1)
        return reduced.squeeze(1) if offsets is None else reduced


def _decoded_rows(table: Codes, input: Tensor) -> Tensor:
    rows = F.embedding(input, table.codes).float()
    if table.zero_point is not None:
        rows = rows - _rows(input, table.zero_point).float()
    return rows * _rows(input, table.scale)


def _rows(input: Tensor, values: Tensor) -> Tensor:
    """The values ``[rows, 1]`` of the gathered rows, or the value ``[]`` of all rows."""
    return F.embedding(input, values) if values.dim() else values


QDQ: dict[type[QATLayer], type[nn.Module]] = {
    QATLinear: QDQLinear,
    QATOutputProjection: QDQLinear,
    QATTransposedLinear: QDQTransposedLinear,
    QATConv1d: QDQConv1d,
    QATConv2d: QDQConv2d,
    QATConv3d: QDQConv3d,
    QATConvTranspose1d: QDQConvTranspose1d,
    QATConvTranspose2d: QDQConvTranspose2d,
    QATEmbedding: QDQEmbedding,
    QATEmbeddingBag: QDQEmbeddingBag,
}
"""Maps every class of quantized layers to its layer in a QDQ graph."""


def qdq_class(kind: type[nn.Module] | None) -> type[nn.Module] | None:
    """Return the layer of a QDQ graph for a class of quantized layers; None if ONNX export does not support it."""
    supported = cast("dict[type, type[nn.Module]]", QDQ)
    return next((supported[base] for base in getattr(kind, "__mro__", ()) if base in supported), None)


def has_integer_kernel(kind: type[nn.Module] | None) -> bool:
    """Return whether ONNX Runtime has an integer kernel for a quantized layer class with quantized inputs."""
    return not issubclass(kind or nn.Module, QATConvTranspose1d | QATConvTranspose2d)


def _operands(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The layer's input, weight and bias, and a bias to add after the layer.

    A floating-point bias inside a layer with a quantized input is not safe: ONNX Runtime quantizes it to int32
    (WeightBiasQuantization) and lets it overflow. Added after the layer, it keeps its value.
    """
    quantizer: Any = layer.input
    weight, bias = (part() if isinstance(part, Codes) else part for part in (layer.weight, layer.bias))
    weight, bias = cast(Tensor, weight), cast("Tensor | None", bias)
    x = x if quantizer is None else quantizer(x)
    return (x, weight, None, bias) if layer.__dict__["late_bias"] else (x, weight, bias, None)
