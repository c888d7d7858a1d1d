"""Layers that compute a QDQ graph: integer constants, QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.errors import QatkitWarning
from qatkit.quantization.arithmetic import fake_quantize, quantize
from qatkit.quantization.estimators import computed_qparams
from qatkit.quantization.layers import QATConv2d, QATEmbedding, QATLayer, QATLinear
from qatkit.quantization.modules import FakeQuantize
from qatkit.spec import QuantSpec

_INT32_MAX = 2**31 - 1
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


@torch.library.custom_op("qatkit::dynamic_quantize_linear", mutates_args=())
def _dynamic_quantize_linear(x: Tensor) -> Tensor:
    return fake_quantize(x, *computed_qparams(x, DYNAMIC), DYNAMIC)


@_dynamic_quantize_linear.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class _Codes(nn.Module):
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
        """That of the decoded values: a `forward` may convert its input to ``layer.weight.dtype``."""
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


class _DynamicInputQuantizer(nn.Module):
    """The DynamicQuantizeLinear node of an activation, and the DequantizeLinear node that reads it."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.qatkit.dynamic_quantize_linear(x)
        return out


class _QDQLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        x, weight, bias, late = _operands(self, input)
        out = F.linear(x, weight, bias)
        return out if late is None else out + late


class _QDQConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        x, weight, bias, late = _operands(self, input)
        out = cast(Tensor, self._conv_forward(x, weight, bias))
        return out if late is None else out + late.view(-1, 1, 1)


class _QDQEmbedding(nn.Embedding):
    """Rows of codes, which are decoded after they are gathered; the table stays in integers."""

    def forward(self, input: Tensor) -> Tensor:
        table = cast(_Codes, self.weight)
        rows = F.embedding(input, table.codes).float()
        if table.zero_point is not None:
            rows = rows - _rows(input, table.zero_point).float()
        return rows * _rows(input, table.scale)


def _rows(input: Tensor, values: Tensor) -> Tensor:
    """The values ``[rows, 1]`` of the gathered rows, or the value ``[]`` of all rows."""
    return F.embedding(input, values) if values.dim() else values


QDQ: dict[type[QATLayer], type[nn.Module]] = {
    QATLinear: _QDQLinear,
    QATConv2d: _QDQConv2d,
    QATEmbedding: _QDQEmbedding,
}


def _operands(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The layer's input, weight and bias, and a bias to add after the layer.

    A floating-point bias inside a layer with a quantized input is not safe: ONNX Runtime quantizes it to int32
    (WeightBiasQuantization) and lets it overflow. Added after the layer, it keeps its value.
    """
    quantizer: Any = layer.input
    weight, bias = (part() if isinstance(part, _Codes) else part for part in (layer.weight, layer.bias))
    weight, bias = cast(Tensor, weight), cast("Tensor | None", bias)
    x = x if quantizer is None else quantizer(x)
    late = layer.__dict__["quantized_input"] and not isinstance(layer.bias, _Codes)
    return (x, weight, None, bias) if late else (x, weight, bias, None)


@torch.no_grad()
def to_qdq(name: str, layer: QATLayer, unsigned: bool = True) -> None:
    """Convert a fake-quantized layer to a QDQ layer in place, so that hooks and shared modules keep working.

    Args:
        name: The layer's name, for warnings.
        layer: A calibrated layer.
        unsigned: Whether signed 8-bit weights become unsigned, so that no processor's kernels saturate.
    """
    weight: _Codes | Tensor = layer.weight
    trained_bias = layer.operands(torch.zeros(1))[2]
    bias: _Codes | Tensor | None = trained_bias
    quantizer: InputQuantizer | _DynamicInputQuantizer | None = None
    if (fake_quant := layer.input_fake_quant) is not None:
        quantizer = _DynamicInputQuantizer() if fake_quant.dynamic else InputQuantizer.of(fake_quant)
    if (fake_quant := layer.weight_fake_quant) is not None:
        spec = fake_quant.spec
        scale, zero_point = fake_quant.qparams(layer.weight)
        codes = quantize(layer.weight, scale, zero_point, spec)
        shape = {"tensor": (), "channel": (-1,)}.get(spec.strategy, tuple(scale.shape))
        zero_point = zero_point.reshape(shape).to(codes.dtype)
        if unsigned and is_signed_byte(spec) and quantizer is not None:
            codes, zero_point = _unsigned(codes), _unsigned(zero_point)
        weight = _Codes(codes, scale.reshape(shape), zero_point, spec.group_size or 0)
        if isinstance(layer, QATEmbedding):
            weight = _table(weight, spec)
        if trained_bias is not None and isinstance(quantizer, InputQuantizer) and spec.group_size is None:
            bias = _integer_bias(name, trained_bias, weight, quantizer)
    own = None if layer.input_on_grid else quantizer
    del layer.weight, layer.weight_fake_quant, layer.input_fake_quant
    layer._parameters.pop("bias", None)  # an embedding has none
    layer.__class__ = cast("type[QATLayer]", QDQ[type(layer)])
    layer.__dict__["quantized_input"] = quantizer is not None
    for part, value in (("weight", weight), ("bias", bias), ("input", own)):
        setattr(layer, part, value)


def is_signed_byte(spec: QuantSpec) -> bool:
    """Whether weights have signed codes of 8 bits."""
    return spec.symmetric and spec.num_bits == 8


def _table(weight: _Codes, spec: QuantSpec) -> _Codes:
    """The codes of an embedding, with scales ``[rows, 1]`` that are gathered like rows."""
    assert weight.zero_point is not None
    zero_point = None if spec.symmetric else weight.zero_point
    per_row = weight.scale.dim() > 0
    if per_row and zero_point is not None:
        zero_point = zero_point.view(-1, 1)
    return _Codes(weight.codes, weight.scale.view(-1, 1) if per_row else weight.scale, zero_point)


def _unsigned(codes: Tensor) -> Tensor:
    """int8 as uint8: ONNX Runtime's kernels for unsigned weights never saturate, whatever the processor."""
    return (codes.to(torch.int16) + 128).to(torch.uint8)


def _integer_bias(name: str, bias: Tensor, weight: _Codes, quantizer: InputQuantizer) -> _Codes | Tensor:
    """The bias as int32 codes with scale weight scale x input scale, as integer kernels need it.

    The largest sum that a channel can reach plus its bias must fit into 32 bits, which a tiny scale with a large bias
    violates. Where all codes of the channel represent zero, any scale gives the same weights, so one that fits is
    used; otherwise the bias stays in floating point.
    """
    assert weight.zero_point is not None
    rows = weight.zero_point.dim() * [-1] + weight.zero_point.dim() * (weight.codes.dim() - 1) * [1]
    centred = weight.codes.long() - weight.zero_point.long().view(rows)
    widest_input = max(abs(quantizer.qmin - int(quantizer.zero_point)), abs(quantizer.qmax - int(quantizer.zero_point)))
    reach = centred.abs().flatten(1).sum(1) * widest_input  # [out]

    def codes() -> tuple[Tensor, Tensor, Tensor]:
        scale = weight.scale * quantizer.scale
        values = (bias / scale).round()
        return values, scale, ~(values.double().abs() + reach < _INT32_MAX)  # true for NaN and Inf as well

    values, scale, too_large = codes()
    dead = too_large & (reach == 0) if scale.dim() else too_large.any() & (reach == 0).all()
    if dead.any():
        needed = (bias.abs() if scale.dim() else bias.abs().amax()) / quantizer.scale * 2.0**-24
        weight.scale = torch.where(dead, needed.clamp(min=2.0**-100), weight.scale)
        values, scale, too_large = codes()
    if too_large.any():
        warnings.warn(
            f"layer '{name}': the bias is too large for 32 bits at the layer's scales (output channel "
            f"{int(too_large.nonzero()[0])}: bias {float(bias[too_large][0]):.3g}), so the bias is added in floating "
            "point after the layer; the results are the same, but a convolution runs without integer kernels",
            QatkitWarning,
            stacklevel=5,  # past torch.no_grad's wrapper
        )
        return bias
    return _Codes(values.to(torch.int32), scale)
