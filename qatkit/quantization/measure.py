"""What quantization did to each layer, measured from the layer itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qatkit.quantization.arithmetic import aligned, blocks, quantize
from qatkit.quantization.modules import full_tensor
from qatkit.quantization.prepare import qat_layers
from qatkit.spec import QuantSpec


@dataclass(frozen=True)
class LayerRow:
    """One quantized layer."""

    name: str
    weights: int
    """Number of weights."""
    weight_bits: int
    """Bits of a weight's code; 32 where weights are not quantized."""
    activation_bits: int
    weight_error: float
    """``||fake_quantize(w) - w|| / ||w||``."""
    clip_rate: float
    """Share of weights outside the range of codes."""
    sparsity: float
    """Share of weights whose code stands for zero."""
    code_bytes: int
    """Bytes of the codes at their own width, packed."""


@torch.no_grad()
def layer_table(model: nn.Module) -> list[LayerRow]:
    """Measure every fake-quantized layer of a model; sharded weights are gathered one layer at a time."""
    rows = []
    for name, layer in qat_layers(model):
        weight = full_tensor(layer.weight).float()
        fake_quant, inputs = layer.weight_fake_quant, layer.input_fake_quant
        error, clip_rate, zeros, bits = 0.0, 0.0, (weight == 0).float().mean().item(), 32
        if fake_quant is not None:
            bits, spec = fake_quant.spec.num_bits, fake_quant.spec
            scale, zero_point = (full_tensor(part) for part in fake_quant.qparams(weight))
            error, clip_rate, zeros = measure_weight(weight, scale, zero_point, spec)[1].tolist()
        rows.append(
            LayerRow(
                name=name,
                weights=weight.numel(),
                weight_bits=bits,
                activation_bits=32 if inputs is None else inputs.spec.num_bits,
                weight_error=error,
                clip_rate=clip_rate,
                sparsity=zeros,
                code_bytes=(weight.numel() * bits + 7) // 8,
            )
        )
    return rows


def measure_weight(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Round a weight and measure what that does to it, all on its device.

    Args:
        weight: ``[out, ...]``, float32.
        scale: In its stored shape.
        zero_point: The shape of `scale`.
        spec: Bits, symmetry and strategy.

    Returns:
        The integer codes in the shape of `weight`, and ``[weight_error, clip_rate, sparsity]`` as `LayerRow` has them.
    """
    codes = quantize(weight, scale, zero_point, spec)
    grid = blocks(codes, spec).float() - aligned(zero_point, codes, spec)
    values = (grid * aligned(scale, codes, spec)).view(weight.shape)
    error = (values - weight).norm() / weight.norm().clamp(min=torch.finfo(torch.float32).tiny)
    # half a step beyond the last code is still nearest to it: only what lies further is clipped
    v = blocks(weight, spec) / aligned(scale, weight, spec) + aligned(zero_point, weight, spec)
    clipped = ((v < spec.qmin - 0.5) | (v > spec.qmax + 0.5)).float().mean()
    return codes, torch.stack([error, clipped, (grid == 0).float().mean()])
