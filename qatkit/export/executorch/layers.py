"""Layers of a program that XNNPACK runs with integers, in the operators that ExecuTorch's partitioner recognizes."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.export.onnx.points import to_qdq_points
from qatkit.export.onnx.qdq import to_qdq
from qatkit.export.onnx.qdq_nodes import Codes, InputQuantizer
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.prepare import qat_layers

CODE_SHIFT = 128
"""What is subtracted from unsigned codes and their zero points, because XNNPACK's codes are signed."""
_INT8 = (-128, 127, torch.int8)


def _ops() -> Any:
    """PyTorch's operators for quantized programs, which an import registers."""
    import torch.ao.quantization.fx._decomposed

    return torch.ops.quantized_decomposed


class Quantizer(nn.Module):
    """Quantizes and dequantizes an activation with a calibrated scale."""

    def __init__(self, quantizer: InputQuantizer) -> None:
        super().__init__()
        shift = 0 if quantizer.zero_point.dtype == torch.int8 else CODE_SHIFT
        self.grid = (float(quantizer.scale), int(quantizer.zero_point) - shift, *_INT8)

    def forward(self, x: Tensor) -> Tensor:
        ops = _ops()
        out: Tensor = ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *self.grid), *self.grid)
        return out


class TokenQuantizer(nn.Module):
    """Quantizes and dequantizes an activation whose scales are computed per token."""

    def forward(self, x: Tensor) -> Tensor:
        ops = _ops()
        scale, zero_point = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
        codes = ops.quantize_per_token(x, scale, zero_point, *_INT8)
        out: Tensor = ops.dequantize_per_token(codes, scale, zero_point, *_INT8, torch.float32)
        return out


class Weight(Codes):
    """A weight with one scale per output channel, or per group of inputs."""

    def __init__(self, weight: Codes, bits: int) -> None:
        scale = weight.scale if weight.scale.dim() else weight.scale.expand(len(weight.codes))
        scale = scale.clone()  # XNNPACK's exporter writes all memory behind a tensor
        zeros = torch.zeros(scale.shape, dtype=torch.int8 if weight.block_size else torch.int64)
        super().__init__(weight.codes.to(torch.int8).clone(), scale, zeros, weight.block_size)
        self.grid = (-8, 7, torch.int8) if bits <= 4 else _INT8

    def forward(self) -> Tensor:
        ops = _ops()
        stored = (self.codes, self.scale, self.zero_point)
        if self.block_size:
            out: Tensor = ops.dequantize_per_channel_group(*stored, *self.grid, self.block_size, torch.float32)
        else:
            out = ops.dequantize_per_channel(*stored, 0, *self.grid)
        return out


def to_decomposed(model: nn.Module) -> None:
    """Convert all fake-quantized layers and output quantizers of a calibrated model, in place.

    Raises:
        QatkitError: a bias does not fit into 32 bits at the layer's scales.
    """
    for name, layer in qat_layers(model):
        _convert(name, layer)
    to_qdq_points(model)
    made: dict[nn.Module, Quantizer] = {}
    for module in list(model.modules()):
        for part, child in module._modules.items():
            if isinstance(child, InputQuantizer):
                if child not in made:
                    made[child] = Quantizer(child)
                module._modules[part] = made[child]


def _convert(name: str, layer: QATLayer) -> None:
    assert layer.weight_fake_quant is not None
    assert layer.input_fake_quant is not None
    bits, dynamic = layer.weight_fake_quant.spec.num_bits, layer.input_fake_quant.dynamic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QatkitWarning)  # of a bias that does not fit, which is an error here
        to_qdq(name, layer, unsigned=False, float_bias=True)
    if layer.__dict__["late_bias"] and layer.bias is not None and not dynamic:
        raise QatkitError(
            f"layer '{name}': the bias is too large for 32 bits at the layer's scales",
            advice="exclude the layer, or train longer: one of its scales is almost 0",
        )
    parts = cast("dict[str, nn.Module]", layer._modules)
    weight = cast(Codes, parts["weight"])
    packs = dynamic and weight.codes.shape[1] % 2 == 0  # XNNPACK computes garbage with rows of half a byte more
    parts["weight"] = Weight(weight, bits if packs else 8)
    if dynamic:
        parts["input"] = TokenQuantizer()
    layer.__dict__["late_bias"] = False
