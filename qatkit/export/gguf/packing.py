"""The block types of GGUF that hold trained codes and scales exactly, and their bytes.

A row of a weight is a sequence of blocks; a block is a scale followed by the codes. Scales are not recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from qatkit.common.tables import Table
from qatkit.export.e4m3 import e4m3, read_e4m3
from qatkit.export.gguf.bits import Array, float16, joined, packed_bits, read_float16
from qatkit.export.gguf.super_blocks import LAYOUTS
from qatkit.quantization.observers import OBSERVERS
from qatkit.quantization.scale_dtypes import SUPER_BLOCK
from qatkit.schemes import LLAMA_CPP_32, LLAMA_CPP_256, SCHEMES
from qatkit.spec import QuantSpec

_FIELDS = ("num_bits", "symmetric", "strategy", "group_size", "scale_dtype", "type")
"""The spec fields that determine the bytes; with symmetric codes, the scale rule affects only the scale."""


@dataclass(frozen=True)
class BlockType:
    """A type of GGUF tensors, with the quantization that it stores exactly."""

    name: str
    """The name in GGUF, which is also a name of `gguf.GGMLQuantizationType`."""
    spec: QuantSpec
    """The quantization that this type stores exactly, with any observer."""
    pack: Callable[[Array, Array, Array, Array], Array]
    """``(codes [out, in], scales [out, groups], zero points, outer scale)``: return the bytes ``[out, bytes]``."""
    read_scales: Callable[[Array], Array]
    """``(bytes [..., bytes of a block])``: return the scales ``[..., numbers]`` in float32; of super-blocks, the outer
    scales, the scales and the minima.
    """
    file_type: str
    """The name of `gguf.LlamaFileType` for a file with mostly this type."""
    groups: int = 1
    """The number of scales per block; super-blocks have layouts of their own."""

    @property
    def block(self) -> int:
        """The number of weights per block."""
        assert self.spec.group_size is not None
        return SUPER_BLOCK if self.spec.super_blocks else self.spec.group_size * self.groups

    @property
    def activation(self) -> QuantSpec:
        """How llama.cpp quantizes the inputs of a layer with this type, on CPUs."""
        return LLAMA_CPP_256 if self.block == SUPER_BLOCK else LLAMA_CPP_32

    def differences(self, spec: QuantSpec) -> list[str]:
        """Return the names of the fields in which `spec` differs from this type."""
        stored = self.spec.scale_rule == "minimum" or self.spec.super_blocks
        fields = (*_FIELDS, "scale_rule") if stored else _FIELDS
        differences = [name for name in fields if getattr(spec, name) != getattr(self.spec, name)]
        computed = self.spec.super_blocks and OBSERVERS[spec.observer].computed
        return [*differences, "observer"] if computed else differences


def _blocks(codes: Array, scales: Array) -> Array:
    return codes.reshape(*scales.shape, -1)


def _nibbles(codes: Array) -> Array:
    """Two 4-bit codes per byte: the low nibbles are the first half of a block."""
    return packed_bits(codes, 4, 16)


def _q8_0(codes: Array, scales: Array, zero_points: Array, outer: Array) -> Array:
    return joined(float16(scales), _blocks(codes, scales).astype(np.int8).view(np.uint8))


def _q4_0(codes: Array, scales: Array, zero_points: Array, outer: Array) -> Array:
    return joined(float16(scales), _nibbles(_blocks(codes, scales) + 8))


def _q4_1(codes: Array, scales: Array, zero_points: Array, outer: Array) -> Array:
    return joined(float16(scales), float16(-scales * zero_points), _nibbles(_blocks(codes, scales)))


def _iq4_nl(codes: Array, scales: Array, zero_points: Array, outer: Array) -> Array:
    return joined(float16(scales), _nibbles(_blocks(codes, scales)))


def _q5_0(codes: Array, scales: Array, zero_points: Array, outer: Array) -> Array:
    return joined(float16(scales), *_five_bits(_blocks(codes, scales) + 16))


def _q5_1(codes: Array, scales: Array, zero_points: Array, outer: Array) -> Array:
    return joined(float16(scales), float16(-scales * zero_points), *_five_bits(_blocks(codes, scales)))


def _five_bits(codes: Array) -> tuple[Array, Array]:
    """The fifth bits of a block, and then the low nibbles."""
    codes = codes.astype(np.uint8)
    return packed_bits(codes >> 4, 1, 1), _nibbles(codes & 15)


def _mxfp4(codes: Array, scales: Array, zero_points: Array, outer: Array) -> Array:
    exponents = np.frexp(scales)[1] - 1
    assert np.array_equal(np.ldexp(np.float32(1), exponents), scales), "training rounds the scales to powers of two"
    return joined((exponents + 127).astype(np.uint8)[..., None], _nibbles(_blocks(codes, scales)))


def _read_exponent(blocks: Array) -> Array:
    return np.ldexp(np.float32(1), blocks[..., :1].astype(np.int32) - 127)


def _tq2_0(codes: Array, scales: Array, zero_points: Array, outer: Array) -> Array:
    return joined(packed_bits(_blocks(codes, scales) + 1, 2, 32), float16(scales))


def _tq1_0(codes: Array, scales: Array, zero_points: Array, outer: Array) -> Array:
    """Five codes per byte as the digits of a fraction in base 3, scaled to 256 so that a product takes out a digit."""
    digits = _blocks(codes, scales).astype(np.int64) + 1
    first, second, last = np.split(digits, [160, 240], axis=-1)
    runs = [run.reshape(*scales.shape, -1, size) for run, size in ((first, 32), (second, 16), (last, 4))]
    numbers = [(run * 3 ** np.arange(4, 4 - run.shape[-2], -1)[:, None]).sum(-2) for run in runs]
    stored = [((number * 256 + 242) // 243).astype(np.uint8) for number in numbers]
    return joined(*stored, float16(scales))


def _nvfp4(codes: Array, scales: Array, zero_points: Array, outer: Array) -> Array:
    own = scales.reshape(len(scales), -1, 4)
    nibbles = packed_bits(codes.reshape(*own.shape, -1), 4, 8)
    return joined(e4m3(own), nibbles.reshape(*own.shape[:2], -1))


def _read_e4m3(blocks: Array) -> Array:
    return read_e4m3(blocks[..., :4])


def _read_first(blocks: Array) -> Array:
    return read_float16(blocks[..., :2])


def _read_last(blocks: Array) -> Array:
    return read_float16(blocks[..., -2:])


def _spec(bits: int, size: int = 32, kind: str = "int", scale: str = "float16", observer: str = "minmax") -> QuantSpec:
    return QuantSpec(
        num_bits=bits, type=kind, strategy="group", group_size=size, scale_dtype=scale, observer=observer
    )  # fmt: skip


def _with_minimum(bits: int) -> QuantSpec:
    return replace(_spec(bits), symmetric=False, scale_rule="minimum")


def _weight(name: str) -> QuantSpec:
    spec = SCHEMES[name].weight
    assert spec is not None
    return spec


def _k_quant(name: str, file_type: str) -> BlockType:
    """The type of a scheme with super-blocks."""
    spec, layout = _weight(name), LAYOUTS[name]
    lowest = int(spec.qmin)
    return BlockType(name, spec, partial(layout.bytes, lowest=lowest), layout.read, file_type)


BLOCK_TYPES = Table(
    "GGUF type",
    [
        BlockType("Q8_0", _spec(8), _q8_0, _read_first, "MOSTLY_Q8_0"),
        BlockType("Q5_0", _spec(5), _q5_0, _read_first, "MOSTLY_Q5_0"),
        BlockType("Q5_1", _with_minimum(5), _q5_1, _read_first, "MOSTLY_Q5_1"),
        BlockType("Q4_0", _spec(4), _q4_0, _read_first, "MOSTLY_Q4_0"),
        BlockType("Q4_1", _with_minimum(4), _q4_1, _read_first, "MOSTLY_Q4_1"),
        BlockType("IQ4_NL", _spec(4, kind="nonlinear"), _iq4_nl, _read_first, "MOSTLY_IQ4_NL"),
        _k_quant("Q6_K", "MOSTLY_Q6_K"),
        _k_quant("Q5_K", "MOSTLY_Q5_K_S"),
        _k_quant("Q4_K", "MOSTLY_Q4_K_S"),
        _k_quant("Q3_K", "MOSTLY_Q3_K_S"),
        _k_quant("Q2_K", "MOSTLY_Q2_K"),
        BlockType("MXFP4", _spec(4, kind="float", scale="float8_e8m0fnu"), _mxfp4, _read_exponent, "MOSTLY_MXFP4_MOE"),
        BlockType("NVFP4", _weight("NVFP4_UE4M3"), _nvfp4, _read_e4m3, "MOSTLY_NVFP4", groups=4),
        BlockType("TQ1_0", _weight("TQ1_0"), _tq1_0, _read_last, "MOSTLY_TQ1_0"),
        BlockType("TQ2_0", _spec(2, 256, "ternary", observer="absmean"), _tq2_0, _read_last, "MOSTLY_TQ2_0"),
    ],
)
"""Every supported type by name."""


def block_type_of(spec: QuantSpec) -> BlockType | None:
    """Return the type that stores this quantization exactly, or None.

    Example:
        >>> from qatkit import scheme
        >>> block_type_of(scheme("Q4_0").weight).name
        'Q4_0'
        >>> block_type_of(scheme("W4A16").weight)
    """
    return next((row for row in BLOCK_TYPES.values() if not row.differences(spec)), None)


def nearest_type(spec: QuantSpec, inputs: int) -> BlockType:
    """Return the type with the same element type if there is one, and the closest number of bits.

    Its blocks divide the inputs of the layer, if there is such a type.
    """

    def distance(row: BlockType) -> tuple[bool, bool, int, bool]:
        return (
            bool(inputs % row.block),
            row.spec.type != spec.type,
            abs(row.spec.num_bits - spec.num_bits),
            row.spec.symmetric != spec.symmetric,
        )

    return min(BLOCK_TYPES.values(), key=distance)
