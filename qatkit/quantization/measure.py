"""Per-layer measurements: weight error, clip rate, sparsity and size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qatkit.quantization.arithmetic import dequantize, exact_codes, quantize
from qatkit.quantization.modules import full_tensor
from qatkit.quantization.prepare import qat_weights
from qatkit.spec import QuantSpec


@dataclass(frozen=True)
class LayerRow:
    """The measurements of one quantized layer."""

    name: str
    weights: int
    """Number of weights."""
    weight_bits: int
    """Bits per weight code; 32 if weights are not quantized."""
    activation_bits: int
    weight_error: float
    """``||fake_quantize(w) - w|| / ||w||``."""
    clip_rate: float
    """Fraction of weights outside the range of codes."""
    sparsity: float
    """Fraction of weights that are zero after quantization."""
    code_bytes: int
    """Bytes of the codes, packed at `weight_bits`."""


@torch.no_grad()
def layer_table(model: nn.Module) -> list[LayerRow]:
    """Measure every fake-quantized layer of a model.

    Sharded weights are gathered one layer at a time.
    """
    rows = []
    for own in qat_weights(model):
        weight, fake_quant, activation = full_tensor(own.matrix).float(), own.weight_fake_quant, own.input_fake_quant
        error, clip_rate, zeros, bits = 0.0, 0.0, (weight == 0).float().mean().item(), 32
        if fake_quant is not None:
            bits = fake_quant.spec.num_bits
            scale, zero_point = fake_quant.whole_qparams(weight)
            error, clip_rate, zeros = measure_weight(weight, scale, zero_point, fake_quant.spec)[1].tolist()
        rows.append(
            LayerRow(
                name=own.name,
                weights=weight.numel(),
                weight_bits=bits,
                activation_bits=32 if activation is None else activation.spec.num_bits,
                weight_error=error,
                clip_rate=clip_rate,
                sparsity=zeros,
                code_bytes=(weight.numel() * bits + 7) // 8,
            )
        )
    return rows


def measure_weight(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Quantize a weight and measure its error, on its device.

    Args:
        weight: ``[out, ...]``, float32.
        scale: The scale in its stored shape.
        zero_point: The zero point, in the shape of `scale`.
        spec: Its quantization.

    Returns:
        The codes in the shape of `weight`, and a tensor ``[weight_error, clip_rate, sparsity]``; see `LayerRow`.
    """
    codes = quantize(weight, scale, zero_point, spec)
    values = dequantize(codes, scale, zero_point, spec)
    error = (values - weight).norm() / weight.norm().clamp(min=torch.finfo(torch.float32).tiny)
    # integer codes round to the last code up to half a step beyond it; only values further out are clipped
    v = exact_codes(weight, scale, zero_point, spec)
    half = 0.0 if spec.is_float else 0.5
    clipped = ((v < spec.qmin - half) | (v > spec.qmax + half)).float().mean()
    return codes, torch.stack([error, clipped, (values == 0).float().mean()])
