"""The block types of GGUF that hold trained codes and scales exactly, and their bytes.

A row of a weight is a sequence of blocks; a block is a scale followed by the codes. Scales are not recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qatkit.common.tables import Table
from qatkit.spec import QuantSpec

Array = np.ndarray[Any, Any]

_FIELDS = ("num_bits", "symmetric", "strategy", "group_size", "scale_dtype", "type")
"""The spec fields that determine the bytes; with symmetric codes, the scale rule affects only the scale."""


@dataclass(frozen=True)
class BlockType:
    """A type of GGUF tensors, with the quantization that it stores exactly."""

    name: str
    """The name in GGUF, which is also a name of `gguf.GGMLQuantizationType`."""
    spec: QuantSpec
    """The quantization that this type stores exactly, with any observer."""
    pack: Callable[[Array, Array, Array], Array]
    """``(codes [out, in], scales [out, blocks], zero points)``: return the bytes ``[out, bytes of a row]``."""
    scale_bytes: slice
    """The bytes of the scale in a block."""
    read_scale: Callable[[Array], Array]
    """``(bytes of the scales [..., bytes])``: return the scales ``[...]`` in float32."""

    @property
    def block(self) -> int:
        """The number of weights per block."""
        assert self.spec.group_size is not None
        return self.spec.group_size

    def differences(self, spec: QuantSpec) -> list[str]:
        """Return the names of the fields in which `spec` differs from this type."""
        fields = (*_FIELDS, "scale_rule") if self.spec.scale_rule == "minimum" else _FIELDS
        return [name for name in fields if getattr(spec, name) != getattr(self.spec, name)]


def _halves(codes: Array) -> Array:
    """Two 4-bit codes per byte: the low nibbles are the first half of the last dimension."""
    half = codes.shape[-1] // 2
    low, high = codes[..., :half].astype(np.uint8), codes[..., half:].astype(np.uint8)
    return low | (high << np.uint8(4))


def _blocks(codes: Array, scales: Array) -> Array:
    return codes.reshape(*scales.shape, -1)


def _joined(*parts: Array) -> Array:
    return np.concatenate(parts, axis=-1).reshape(parts[0].shape[0], -1)


def _float16(scales: Array) -> Array:
    stored = scales.astype(np.float16)
    assert np.array_equal(stored.astype(np.float32), scales), "training rounds to float16"
    return stored[..., None].view(np.uint8)


def _read_float16(stored: Array) -> Array:
    return np.ascontiguousarray(stored).view(np.float16)[..., 0].astype(np.float32)


def _q8_0(codes: Array, scales: Array, zero_points: Array) -> Array:
    return _joined(_float16(scales), _blocks(codes, scales).astype(np.int8).view(np.uint8))


def _q4_0(codes: Array, scales: Array, zero_points: Array) -> Array:
    return _joined(_float16(scales), _halves(_blocks(codes, scales) + 8))


def _q4_1(codes: Array, scales: Array, zero_points: Array) -> Array:
    return _joined(_float16(scales), _minimum(scales, zero_points), _halves(_blocks(codes, scales)))


def _q5_0(codes: Array, scales: Array, zero_points: Array) -> Array:
    return _joined(_float16(scales), *_five_bits(_blocks(codes, scales) + 16))


def _q5_1(codes: Array, scales: Array, zero_points: Array) -> Array:
    return _joined(_float16(scales), _minimum(scales, zero_points), *_five_bits(_blocks(codes, scales)))


def _five_bits(codes: Array) -> tuple[Array, Array]:
    """The fifth bits of a block, and then the low nibbles."""
    codes = codes.astype(np.uint8)
    return np.packbits(codes >> 4, axis=-1, bitorder="little"), _halves(codes & 15)


def _minimum(scales: Array, zero_points: Array) -> Array:
    """The value of code 0."""
    return _float16(-scales * zero_points)


def _mxfp4(codes: Array, scales: Array, zero_points: Array) -> Array:
    exponents = np.frexp(scales)[1] - 1
    assert np.array_equal(np.ldexp(np.float32(1), exponents), scales), "training rounds the scales to powers of two"
    return _joined((exponents + 127).astype(np.uint8)[..., None], _halves(_blocks(codes, scales)))


def _read_exponent(stored: Array) -> Array:
    return np.ldexp(np.float32(1), stored[..., 0].astype(np.int32) - 127)


def _tq2_0(codes: Array, scales: Array, zero_points: Array) -> Array:
    """Four 2-bit codes per byte: those of a half block whose distance is 32."""
    runs = (codes.reshape(*scales.shape, 2, 4, 32) + 1).astype(np.uint8)
    packed = np.bitwise_or.reduce(runs << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=-2)
    return _joined(packed.reshape(*scales.shape, 64), _float16(scales))


def _spec(bits: int, size: int = 32, kind: str = "int", scale: Any = "float16", observer: str = "minmax") -> QuantSpec:
    return QuantSpec(
        num_bits=bits, type=kind, strategy="group", group_size=size, scale_dtype=scale, observer=observer
    )  # fmt: skip


_FIRST = slice(0, 2)

BLOCK_TYPES = Table(
    "GGUF type",
    [
        BlockType("Q8_0", _spec(8), _q8_0, _FIRST, _read_float16),
        BlockType("Q5_0", _spec(5), _q5_0, _FIRST, _read_float16),
        BlockType("Q5_1", replace(_spec(5), symmetric=False, scale_rule="minimum"), _q5_1, _FIRST, _read_float16),
        BlockType("Q4_0", _spec(4), _q4_0, _FIRST, _read_float16),
        BlockType("Q4_1", replace(_spec(4), symmetric=False, scale_rule="minimum"), _q4_1, _FIRST, _read_float16),
        BlockType("MXFP4", _spec(4, kind="float", scale="float8_e8m0fnu"), _mxfp4, slice(0, 1), _read_exponent),
        BlockType("TQ2_0", _spec(2, 256, "ternary", observer="absmean"), _tq2_0, slice(64, 66), _read_float16),
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


def nearest_type(spec: QuantSpec) -> BlockType:
    """Return the type with the same element type if there is one, and the closest number of bits."""

    def distance(row: BlockType) -> tuple[bool, int, bool]:
        return row.spec.type != spec.type, abs(row.spec.num_bits - spec.num_bits), row.spec.symmetric != spec.symmetric

    return min(BLOCK_TYPES.values(), key=distance)
