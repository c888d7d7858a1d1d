"""The block types of GGUF that hold trained codes and scales exactly, and their bytes.

A row of a weight is a sequence of blocks; a block is a scale followed by the codes. Scales are not recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qatkit.common.tables import Table
from qatkit.spec import QuantSpec

Array = np.ndarray[Any, Any]

_FIELDS = ("num_bits", "symmetric", "strategy", "group_size", "scale_dtype", "type")
"""Fields of a spec on which the bytes depend; the scale rule only decides which scale is stored."""


@dataclass(frozen=True)
class BlockType:
    """A type of GGUF tensors, with the quantization that it stores exactly."""

    name: str
    """The name in GGUF, which is also a name of `gguf.GGMLQuantizationType`."""
    spec: QuantSpec
    """The quantization that fits, whatever its scale rule and observer."""
    pack: Callable[[Array, Array], Array]
    """``(codes [out, in], scales [out, blocks])``: return the bytes ``[out, bytes of a row]``."""
    scale_bytes: slice
    """The bytes of the scale in a block."""
    scale_type: str = "float16"
    """The NumPy type of the scale's bytes; "uint8" for the exponent of a power of two."""

    @property
    def block(self) -> int:
        """The number of weights per block."""
        assert self.spec.group_size is not None
        return self.spec.group_size

    def differences(self, spec: QuantSpec) -> list[str]:
        """Return the names of the fields in which `spec` differs from this type."""
        return [name for name in _FIELDS if getattr(spec, name) != getattr(self.spec, name)]


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
    assert np.array_equal(stored.astype(np.float32), scales), "training rounds the scales to float16"
    return stored[..., None].view(np.uint8)


def _q8_0(codes: Array, scales: Array) -> Array:
    return _joined(_float16(scales), _blocks(codes, scales).astype(np.int8).view(np.uint8))


def _q4_0(codes: Array, scales: Array) -> Array:
    return _joined(_float16(scales), _halves(_blocks(codes, scales) + 8))


def _spec(bits: int, size: int = 32, kind: str = "int", scale: Any = "float16", observer: str = "minmax") -> QuantSpec:
    return QuantSpec(
        num_bits=bits, type=kind, strategy="group", group_size=size, scale_dtype=scale, observer=observer
    )  # fmt: skip


BLOCK_TYPES = Table(
    "GGUF type",
    [
        BlockType("Q8_0", _spec(8), _q8_0, slice(0, 2)),
        BlockType("Q4_0", _spec(4), _q4_0, slice(0, 2)),
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
