"""Layers with multiple weights in a QDQ graph: every part becomes a quantized linear layer of its own.

The exporter converts these linear layers as it converts all others, and verification compares them under the names of
the parts: ``{layer}.q_proj.weight.codes``.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from qatkit.export.onnx.qdq_recurrent import QDQRecurrent
from qatkit.quantization.attention import QATMultiheadAttention
from qatkit.quantization.layers import QATLinear
from qatkit.quantization.parts import QATParts
from qatkit.quantization.recurrent import QATGRU, QATLSTM, QATRNN


class QDQMultiheadAttention(QATMultiheadAttention):
    """Multi-head attention whose input projections are layers: q_proj, k_proj and v_proj."""

    def _project(self, part: str, x: Tensor) -> Tensor:
        out: Tensor = cast(nn.Module, self._modules[part])(x)
        return out


EXPLICIT: dict[type[QATParts], type[QATParts]] = {
    QATMultiheadAttention: QDQMultiheadAttention,
    QATLSTM: QDQRecurrent,
    QATGRU: QDQRecurrent,
    QATRNN: QDQRecurrent,
}
"""Maps every class of layers with multiple weights that ONNX export supports to the class whose parts are layers."""

_SPLIT = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
"""Parameters of attention layers that the layers of the parts replace; torch's own code checks whether they exist."""


def part_layers(model: nn.Module) -> list[tuple[str, QATLinear]]:
    """Return every part of the layers with multiple weights as a linear layer, with its name.

    The linear layers share the tensors and quantizers of the model.
    """
    return [
        (f"{name}.{part}" if name else part, _part_layer(layer, part))
        for name, layer in model.named_modules()
        if type(layer) in EXPLICIT
        for part in cast(QATParts, layer).part_names()
    ]


def to_explicit(model: nn.Module) -> None:
    """In layers with multiple weights, replace the weights with linear layers, in place."""
    for layer in list(model.modules()):
        if type(layer) not in EXPLICIT:
            continue
        parts = cast(QATParts, layer)
        linears = {part: _part_layer(parts, part) for part in parts.part_names()}
        for part, linear in linears.items():
            for own in (f"{part}_fake_quant", f"{part}_input_fake_quant"):
                parts._modules.pop(own, None)
            parts._parameters.pop(part, None)
            parts._modules[part] = linear
        for name in _SPLIT:
            if name in parts._parameters:
                parts._parameters[name] = None
        parts.__class__ = EXPLICIT[type(parts)]


def _part_layer(layer: QATParts, part: str) -> QATLinear:
    matrix, bias = layer.matrix(part), layer.part_bias(part)
    linear = QATLinear(matrix.shape[1], matrix.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(matrix.detach(), requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    linear.weight_fake_quant, linear.input_fake_quant = layer.weight_quantizer(part), layer.input_quantizer(part)
    return linear
