"""Convert fake-quantized layers to layers that compute a QDQ graph."""

from __future__ import annotations

import warnings
from typing import cast

import torch
from torch import Tensor

from qatkit.errors import QatkitWarning
from qatkit.export.onnx.qdq_layers import has_integer_kernel, qdq_class
from qatkit.export.onnx.qdq_nodes import Codes, DynamicInputQuantizer, InputQuantizer
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.layers import QATEmbedding, QATEmbeddingBag, QATLayer
from qatkit.spec import QuantSpec

_INT32_MAX = 2**31 - 1


@torch.no_grad()
def to_qdq(name: str, layer: QATLayer, unsigned: bool = True, float_bias: bool = False) -> None:
    """Convert a fake-quantized layer to a QDQ layer in place, so that hooks and shared modules keep working.

    Args:
        name: The layer's name, for warnings.
        layer: A calibrated layer.
        unsigned: Whether signed 8-bit weights become unsigned, so that no processor's kernels saturate.
        float_bias: Whether a bias is stored as the value of its int32 codes.
    """
    matrix = layer.matrix  # [out, in, ...]
    weight: Codes | Tensor = matrix if layer.transposed else layer.weight
    trained_bias = layer.operands(torch.zeros(1))[2]
    bias: Codes | Tensor | None = trained_bias
    quantizer: InputQuantizer | DynamicInputQuantizer | None = None
    if (fake_quant := layer.input_fake_quant) is not None:
        quantizer = DynamicInputQuantizer() if fake_quant.dynamic else InputQuantizer.of(fake_quant)
    if (fake_quant := layer.weight_fake_quant) is not None:
        spec = fake_quant.spec
        scale, zero_point = fake_quant.qparams(matrix)
        codes = quantize(matrix, scale, zero_point, spec)
        shape = {"tensor": (), "channel": (-1,)}.get(spec.strategy, tuple(scale.shape))
        zero_point = zero_point.reshape(shape).to(codes.dtype)
        if unsigned and quantizer is not None and is_signed_byte(spec) and has_integer_kernel(type(layer)):
            codes, zero_point = _unsigned(codes), _unsigned(zero_point)
        needed = not (isinstance(quantizer, DynamicInputQuantizer) and codes.dtype == torch.int8 and spec.symmetric)
        weight = Codes(codes, scale.reshape(shape), zero_point if needed else None, spec.group_size or 0)
        if isinstance(layer, QATEmbedding | QATEmbeddingBag):
            weight = _table(weight, spec)
        if trained_bias is not None and isinstance(quantizer, InputQuantizer) and spec.group_size is None:
            bias = _integer_bias(name, trained_bias, weight, quantizer)
    own = None if layer.input_on_grid else quantizer
    del layer.weight, layer.weight_fake_quant, layer.input_fake_quant
    layer._parameters.pop("bias", None)  # an embedding has none
    layer.__class__ = cast("type[QATLayer]", qdq_class(type(layer)))
    layer.__dict__["late_bias"] = quantizer is not None and not isinstance(bias, Codes)
    if float_bias and isinstance(bias, Codes):
        bias = trained_bias
    for part, value in (("weight", weight), ("bias", bias), ("input", own)):
        setattr(layer, part, value)


def is_signed_byte(spec: QuantSpec) -> bool:
    """Whether weights have signed codes of 8 bits."""
    return spec.symmetric and spec.num_bits == 8


def _table(weight: Codes, spec: QuantSpec) -> Codes:
    """The codes of an embedding, with scales ``[rows, 1]`` that are gathered like rows."""
    assert weight.zero_point is not None
    zero_point = None if spec.symmetric else weight.zero_point
    per_row = weight.scale.dim() > 0
    if per_row and zero_point is not None:
        zero_point = zero_point.view(-1, 1)
    return Codes(weight.codes, weight.scale.view(-1, 1) if per_row else weight.scale, zero_point)


def _unsigned(codes: Tensor) -> Tensor:
    """int8 as uint8: ONNX Runtime's kernels for unsigned weights never saturate, whatever the processor."""
    return (codes.to(torch.int16) + 128).to(torch.uint8)


def _integer_bias(name: str, bias: Tensor, weight: Codes, quantizer: InputQuantizer) -> Codes | Tensor:
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
            stacklevel=6,  # past torch.no_grad's wrapper
        )
        return bias
    return Codes(values.to(torch.int32), scale)
