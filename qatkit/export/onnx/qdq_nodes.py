"""The nodes of a QDQ graph as modules: integer constants, QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qatkit.quantization.arithmetic import fake_quantize
from qatkit.quantization.estimators import computed_qparams
from qatkit.quantization.modules import FakeQuantize
from qatkit.spec import QuantSpec

DYNAMIC = QuantSpec(8, symmetric=False, strategy="tensor", dynamic=True)
"""The quantization that DynamicQuantizeLinear computes."""


@torch.library.custom_op("qatkit::quantize_linear", mutates_args=())
def _quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    codes = (x / scale).round() + zero_point
    return codes.clamp(qmin, qmax).to(zero_point.dtype)


@_quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("qatkit::dequantize_linear", mutates_args=())
def _dequantize_linear(codes: Tensor, scale: Tensor, zero_point: Tensor | None, block_size: int) -> Tensor:
    grid = codes.view(*codes.shape[:-1], -1, block_size) if block_size else codes
    shape = [*scale.shape, *[1] * (grid.dim() - scale.dim())]
    centred = grid.float() if zero_point is None else grid.float() - zero_point.float().view(shape)
    return (centred * scale.view(shape)).view(codes.shape)


@_dequantize_linear.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor | None, block_size: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@torch.library.custom_op("qatkit::dynamic_linear", mutates_args=())
def _dynamic_linear(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    x = fake_quantize(x, *computed_qparams(x, DYNAMIC), DYNAMIC)
    return nn.functional.linear(x, _dequantize_linear(codes, scale, zero_point, 0))


@_dynamic_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(codes))


class Codes(nn.Module):
    """An integer constant and the DequantizeLinear node that reads it."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, block_size: int = 0) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.block_size = block_size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoded values, because a `forward` may convert its input to ``layer.weight.dtype``."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """As `dtype`."""
        return self.scale.device

    @property
    def shape(self) -> torch.Size:
        """As `dtype`."""
        return self.codes.shape

    def forward(self) -> Tensor:
        out: Tensor = torch.ops.qatkit.dequantize_linear(self.codes, self.scale, self.zero_point, self.block_size)
        return out


class InputQuantizer(nn.Module):
    """The QuantizeLinear and DequantizeLinear nodes of an activation with per-tensor quantization."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.qmin, self.qmax = spec.qmin, spec.qmax

    @classmethod
    def of(cls, fake_quant: FakeQuantize) -> InputQuantizer:
        """Return the nodes for a static activation quantizer."""
        scale, zero_point = fake_quant.qparams(torch.empty(0))  # stored: dynamic scales were refused
        dtype = torch.int8 if fake_quant.spec.symmetric else torch.uint8
        return cls(scale.view(()), zero_point.view(()).to(dtype), fake_quant.spec)

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.ops.qatkit.quantize_linear(x, self.scale, self.zero_point, self.qmin, self.qmax)
        out: Tensor = torch.ops.qatkit.dequantize_linear(codes, self.scale, self.zero_point, 0)
        return out


class DynamicInputQuantizer(nn.Module):
    """The DynamicQuantizeLinear node of an activation, whose codes are multiplied by those of a weight.

    ONNX Runtime fuses these nodes with the addition of the bias, and then the next addition with LayerNorm.
    """

    def forward(self, x: Tensor, weight: Codes) -> Tensor:
        """The product ``[..., out]``."""
        out: Tensor = torch.ops.qatkit.dynamic_linear(x, weight.codes, weight.scale, weight.zero_point)
        return out
