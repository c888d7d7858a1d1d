"""The quantized class of every supported layer type."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from qatkit.quantization.attention import QATMultiheadAttention
from qatkit.quantization.experts import expert_weights, experts_class, is_experts
from qatkit.quantization.parts import QATParts
from qatkit.quantization.recurrent import QATGRU, QATLSTM, QATRNN

PARTS: dict[type[nn.Module], type[QATParts]] = {
    nn.MultiheadAttention: QATMultiheadAttention, nn.LSTM: QATLSTM, nn.GRU: QATGRU, nn.RNN: QATRNN
}  # fmt: skip
"""Modules with multiple weights, by exact type; fused experts are found by their attributes."""


def parts_class(module: nn.Module) -> type[QATParts] | None:
    """Return the quantized class for a plain module with multiple weights, or None."""
    if is_experts(module):
        return experts_class(type(module), tuple(name for name, _ in expert_weights(module)))
    return PARTS.get(type(module))


def plain_parts(module: nn.Module, kind: type[QATParts]) -> list[tuple[str, Tensor | None, Tensor]]:
    """Return the name, parameter and matrix ``[out, in]`` of every part of a plain module.

    Args:
        module: A module that is not quantized.
        kind: Its `parts_class`.
    """
    plain = cast(Any, module)  # these methods read nothing that the plain module lacks
    return [(part, kind.parameter(plain, part), kind.matrix(plain, part)) for part in kind.part_names(plain)]
