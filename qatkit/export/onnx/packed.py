"""Layers whose weights are packed into bytes: the nodes MatMulNBits and GatherBlockQuantized of ONNX Runtime.

They hold several codes per byte, one scale per block of inputs and, unless the codes are symmetric, one zero point per
block. ONNX Runtime decodes weights while it multiplies them, and OpenVINO also loads both nodes. `packing_of` decides
which layers are packed; every other weight is a constant of whole bytes (`qatkit.export.onnx.qdq`). The tensors keep
the layers' names: ``{layer}.weight.codes`` (uint8, the first code in the lowest bits), ``.scale`` and ``.zero_point``
(packed like the codes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.export.onnx.contributed import contributed
from qatkit.quantization.arithmetic import fake_quantize, quantize
from qatkit.quantization.estimators import computed_qparams
from qatkit.quantization.layers import QATEmbedding, QATLayer, QATLinear, QATOutputProjection, QATTransposedLinear
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec

_ROUNDED = QuantSpec(8, strategy="group", group_size=32)
"""The quantization of inputs by MatMulNBits at accuracy level 4, for blocks of 32."""
MATMUL_BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes of MatMulNBits."""
GATHER_BLOCKS = tuple(2**power for power in range(4, 15))
"""Block sizes of GatherBlockQuantized that are used."""


@dataclass(frozen=True)
class Packing:
    """The storage of one weight."""

    bits: int
    """Bits per stored code: 2, 4 or 8."""
    block: int
    """Inputs per stored scale. A scale of a larger group is stored several times."""
    level: int = 0
    """Accuracy level of MatMulNBits: 0 multiplies floating-point inputs, 4 rounds every block of inputs to 8 bits."""

    def bytes_per_row(self, inputs: int, whole_blocks: bool) -> int:
        """Size of the codes and scales of one output; codes may have to fill whole blocks."""
        blocks = -(-inputs // self.block)
        return (blocks * self.block if whole_blocks else inputs) * self.bits // 8 + 4 * blocks


def scheme_of(layer: QATLayer) -> Scheme:
    """Return the quantization of a layer."""
    weight, inputs = layer.weight_fake_quant, layer.input_fake_quant
    return Scheme(None if weight is None else weight.spec, None if inputs is None else inputs.spec)


def packing_of(kind: type[nn.Module] | None, inputs: int, scheme: Scheme) -> Packing | None:
    """Return how a layer's weight is packed, or None if it is stored in whole bytes.

    MatMulNBits is several times slower with 2-bit and 8-bit codes than with 4-bit codes, unless it also quantizes its
    input. Weights of 2 and 3 bits are therefore stored in 4 bits, and weights of more than 4 bits are not packed. Rows
    of embeddings are gathered in 2, 4 or 8 bits; 8-bit embeddings are packed only if they have per-group scales.

    Args:
        kind: The quantized class of the layer.
        inputs: Inputs per output; for an embedding, the size of a row.
        scheme: The layer's quantization.

    Example:
        >>> packing_of(QATLinear, 64, Scheme(QuantSpec(3, strategy="group", group_size=32)))
        Packing(bits=4, block=32, level=0)
    """
    spec, made = scheme.weight, packed_class(kind)
    if made is None or spec is None or spec.type != "int" or spec.strategy == "block" or spec.has_minimum:
        return None
    if (rounded := scheme.activation) is not None:
        block = rounded.group_size
        if block not in MATMUL_BLOCKS or rounded != replace(_ROUNDED, group_size=block) or made is PackedEmbedding:
            return None
        aligned = spec.group_size is None or spec.group_size % block == 0
        return Packing(4 if spec.num_bits <= 4 else 8, block, level=4) if aligned else None
    if made is PackedEmbedding:
        bits = next(bits for bits in (2, 4, 8) if bits >= spec.num_bits)
        packs = inputs * bits % 8 == 0 and (bits < 8 or spec.strategy == "group")
        return _smallest(bits, inputs, spec, GATHER_BLOCKS) if packs else None
    return _smallest(4, inputs, spec, MATMUL_BLOCKS) if spec.num_bits <= 4 else None


def _smallest(bits: int, inputs: int, spec: QuantSpec, blocks: tuple[int, ...]) -> Packing | None:
    """The block size with the smallest storage whose blocks all have a single scale, or None."""
    group, whole = spec.group_size or inputs, blocks is MATMUL_BLOCKS
    fitting = [Packing(bits, block) for block in blocks if group == inputs or group % block == 0]
    return min(fitting, key=lambda packing: packing.bytes_per_row(inputs, whole), default=None)


class Packed(nn.Module):
    """The packed constants of one weight.

    Args:
        codes: Codes ``[out, in]``, int8 or uint8.
        scale: ``[1]``, ``[out, 1]`` or ``[out, groups]``.
        zero_point: In the shape of `scale`.
        spec: The quantization of the weight.
        packing: Its storage.
        rows: Whether codes are stored as rows ``[out, bytes]``, not in blocks ``[out, blocks, bytes]``.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, packing: Packing, rows: bool = False
    ) -> None:
        super().__init__()
        self.packing, self.shape = packing, codes.shape
        outputs, inputs = codes.shape
        blocks = -(-inputs // packing.block)
        unsigned = codes.to(torch.int16) + (2 ** (packing.bits - 1) if spec.symmetric else 0)
        if not rows:
            unsigned = F.pad(unsigned, (0, blocks * packing.block - inputs)).view(outputs, blocks, packing.block)
        self.register_buffer("codes", pack(unsigned, packing.bits))
        self.register_buffer("scale", _per_block(scale, outputs, blocks))
        points = None if spec.symmetric else pack(_per_block(zero_point, outputs, blocks), packing.bits)
        self.register_buffer("zero_point", points)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoded values, because a `forward` may convert its input to ``layer.weight.dtype``."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """As `dtype`."""
        return self.scale.device


def _per_block(values: Tensor, outputs: int, blocks: int) -> Tensor:
    """Values ``[1]``, ``[out, 1]`` or ``[out, groups]`` as ``[out, blocks]``."""
    rows = values.view(-1, values.shape[-1]).expand(outputs, -1)
    return rows.repeat_interleave(blocks // rows.shape[1], dim=1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integers ``[..., n]`` from 0 to ``2**bits - 1`` into bytes ``[..., ceil(n * bits / 8)]``, lowest bits first.

    Example:
        >>> pack(torch.tensor([1, 2, 3]), 4).tolist()
        [33, 3]
    """
    per_byte = 8 // bits
    codes = F.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % per_byte))
    parts = codes.view(*codes.shape[:-1], -1, per_byte)
    packed = parts[..., 0]
    for index in range(1, per_byte):
        packed = packed | parts[..., index] << bits * index
    return packed.contiguous()


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Integers ``[..., bytes * 8 / bits]``, the inverse of `pack`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    values: Tensor = packed.unsqueeze(-1) >> shifts & 2**bits - 1
    return values.flatten(-2)


def _decoded(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, block: int, inputs: int) -> Tensor:
    """The weight ``[out, in]``."""
    outputs, blocks = scale.shape
    unpacked = _unpacked(codes, bits).view(outputs, -1)
    grid = F.pad(unpacked, (0, blocks * block - unpacked.shape[1])).view(outputs, blocks, block).float()
    middle = 2.0 ** (bits - 1) if zero_point is None else _unpacked(zero_point, bits)[:, :blocks, None].float()
    return ((grid - middle) * scale[..., None]).flatten(1)[:, :inputs]


@torch.library.custom_op("qatkit::matmul_nbits", mutates_args=())
def _matmul_nbits(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    block: int,
    inputs: int,
    level: int,
) -> Tensor:
    if level == 4:
        spec = replace(_ROUNDED, group_size=block)
        x = fake_quantize(x, *computed_qparams(x, spec), spec)
    return F.linear(x, _decoded(codes, scale, zero_point, bits, block, inputs), bias)


@_matmul_nbits.register_fake
def _(x: Tensor, codes: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("qatkit::gather_blocks", mutates_args=())
def _gather_blocks(
    rows: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, block: int, inputs: int
) -> Tensor:
    return F.embedding(rows, _decoded(codes, scale, zero_point, bits, block, inputs))


@_gather_blocks.register_fake
def _(rows: Tensor, codes: Tensor, scale: Tensor, *args: Any) -> Tensor:
    return scale.new_empty((*rows.shape, args[-1]))


class PackedLinear(nn.Linear):
    """A linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        return _product(input, cast(Packed, self.weight), self.bias)


class PackedTransposedLinear(nn.Module):
    """transformers' `Conv1D`, with the codes of its weight as ``[out, in]``."""

    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, cast(Packed, self.weight), self.bias)


def _product(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    bits, block, level = weight.packing.bits, weight.packing.block, weight.packing.level
    out: Tensor = torch.ops.qatkit.matmul_nbits(
        x, weight.codes, weight.scale, weight.zero_point, bias, bits, block, weight.shape[1], level
    )
    return out


class PackedEmbedding(nn.Embedding):
    """An embedding whose rows are decoded after they are gathered."""

    def forward(self, input: Tensor) -> Tensor:
        table = cast(Packed, self.weight)
        bits, block = table.packing.bits, table.packing.block
        out: Tensor = torch.ops.qatkit.gather_blocks(
            input, table.codes, table.scale, table.zero_point, bits, block, table.shape[1]
        )
        return out


PACKED: dict[type[QATLayer], type[nn.Module]] = {
    QATLinear: PackedLinear,
    QATOutputProjection: PackedLinear,
    QATTransposedLinear: PackedTransposedLinear,
    QATEmbedding: PackedEmbedding,
}
"""Maps classes of quantized layers to their layers with packed weights."""


def packed_class(kind: type[nn.Module] | None) -> type[nn.Module] | None:
    """Return the layer with packed weights for a class of quantized layers, or None."""
    supported = cast("dict[type, type[nn.Module]]", PACKED)
    return next((supported[base] for base in getattr(kind, "__mro__", ()) if base in supported), None)


@torch.no_grad()
def to_packed(layer: QATLayer, packing: Packing) -> None:
    """Convert a fake-quantized layer in place, so that hooks and shared modules keep working.

    Args:
        layer: A calibrated layer.
        packing: The result of `packing_of`.
    """
    fake_quant = layer.weight_fake_quant
    assert fake_quant is not None
    scale, zero_point = fake_quant.qparams(layer.matrix)
    codes = quantize(layer.matrix, scale, zero_point, fake_quant.spec)
    weight = Packed(codes, scale, zero_point, fake_quant.spec, packing, isinstance(layer, QATEmbedding))
    del layer.weight, layer.weight_fake_quant, layer.input_fake_quant
    layer.__class__ = cast("type[QATLayer]", packed_class(type(layer)))
    layer.weight = cast(Tensor, weight)


def translations() -> dict[Any, Callable[..., Any]]:
    """Return the ONNX nodes of the operators of packed layers, for `torch.onnx.export`."""
    matmul = contributed("MatMulNBits", ("A", "B", "scales"), ("zero_points", "g_idx", "bias"), _MATMUL_ATTRIBUTES)

    def matmul_nbits(
        x: Any, codes: Any, scale: Any, zero_point: Any, bias: Any, bits: int, block: int, inputs: int, level: int
    ) -> Any:
        sizes = {"K": inputs, "N": int(codes.shape[0]), "bits": bits, "block_size": block, "accuracy_level": level}
        return matmul(x, codes, scale, zero_point, None, bias, **sizes)

    gather = contributed("GatherBlockQuantized", ("data", "indices", "scales"), ("zero_points",), _GATHER_ATTRIBUTES)

    def gather_blocks(x: Any, codes: Any, scale: Any, zero_point: Any, bits: int, block: int, inputs: int) -> Any:
        return gather(codes, x, scale, zero_point, gather_axis=0, quantize_axis=1, bits=bits, block_size=block)

    ops = torch.ops.qatkit
    return {ops.matmul_nbits.default: matmul_nbits, ops.gather_blocks.default: gather_blocks}


_GATHER_ATTRIBUTES = ("gather_axis", "quantize_axis", "bits", "block_size")
_MATMUL_ATTRIBUTES = ("K", "N", "bits", "block_size", "accuracy_level")
