"""The quantization modes of MLX that hold trained codes and scales exactly, and their arrays.

MLX decodes an affine weight as ``scale * code + bias`` in the dtype of the scales. A scale with few significant bits
makes both steps exact, so that the weight equals ``(code - zero_point) * scale`` of training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qatkit.common.tables import Table
from qatkit.export.e4m3 import e4m3
from qatkit.spec import QuantSpec

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Mode:
    """A mode of MLX."""

    name: str
    """The name in MLX, as in ``config.json``."""
    bits: tuple[int, ...]
    """The supported bit widths."""
    group_sizes: tuple[int, ...]
    """The supported group sizes."""
    type: str
    """The element type."""
    scale_dtypes: tuple[str, ...]
    """The dtypes to which training must round the scales."""
    arrays: Callable[[Array, Array, Array, QuantSpec], dict[str, Array]]
    """``(codes [out, in], scales [out, groups], zero points, spec)``: return the arrays of the file by suffix."""

    def problem(self, spec: QuantSpec) -> str | None:
        """Return the first key of a spec that does not fit, with the values that do; None if the spec fits."""
        keys: tuple[tuple[str, object, tuple[object, ...]], ...] = (
            ("type", spec.type, (self.type,)),
            ("strategy", spec.strategy, ("group",)),
            ("num_bits", spec.num_bits, self.bits),
            ("group_size", spec.group_size, self.group_sizes),
            ("scale_dtype", spec.scale_dtype, self.scale_dtypes),
        )
        for name, value, fitting in keys:
            if value not in fitting:
                return f"{name}: {' or '.join(map(str, fitting))}"
        return None


def pack(codes: Array, bits: int) -> Array:
    """Pack unsigned codes ``[out, in]`` into a little-endian bit stream per row, uint32 ``[out, in * bits / 32]``.

    Example:
        >>> pack(np.arange(8, dtype=np.uint8)[None], 4).tolist() == [[0x76543210]]
        True
    """
    stream = (codes.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    packed = np.packbits(stream.reshape(len(codes), -1), axis=-1, bitorder="little")
    return packed.view("<u4")


def _affine(codes: Array, scales: Array, zero_points: Array, spec: QuantSpec) -> dict[str, Array]:
    offset = 1 << (spec.num_bits - 1) if spec.symmetric else 0
    dtype = np.float16 if spec.scale_rule == "minimum" else np.float32
    biases = -scales * (zero_points + offset)
    stored = {"scales": scales.astype(dtype), "biases": biases.astype(dtype)}
    assert np.array_equal(stored["biases"].astype(np.float32), biases), "training rounds the scale so that this holds"
    return {"weight": pack(codes.astype(np.int16) + offset, spec.num_bits), **stored}


def _microscaled(codes: Array, scales: Array, zero_points: Array, spec: QuantSpec) -> dict[str, Array]:
    exponents = np.frexp(scales)[1] - 1
    assert np.array_equal(np.ldexp(np.float32(1), exponents), scales), "training rounds the scales to powers of two"
    return {"weight": pack(codes.view(np.uint8), spec.num_bits), "scales": (exponents + 127).astype(np.uint8)}


def _nvfp4(codes: Array, scales: Array, zero_points: Array, spec: QuantSpec) -> dict[str, Array]:
    return {"weight": pack(codes.view(np.uint8), spec.num_bits), "scales": e4m3(scales)}


MODES = Table(
    "MLX mode",
    [
        Mode("affine", (2, 3, 4, 5, 6, 8), (32, 64, 128), "int", ("float16", "bfloat16"), _affine),
        Mode("mxfp4", (4,), (32,), "float", ("float8_e8m0fnu",), _microscaled),
        Mode("nvfp4", (4,), (16,), "float", ("ue4m3",), _nvfp4),
        Mode("mxfp8", (8,), (32,), "float", ("float8_e8m0fnu",), _microscaled),
    ],
)
"""Every supported mode by name."""


def mode_of(spec: QuantSpec) -> Mode | None:
    """Return the mode that stores this quantization exactly, or None.

    Example:
        >>> from qatkit import scheme
        >>> mode_of(scheme("MLX4").weight).name, mode_of(scheme("W4A16").weight)
        ('affine', None)
    """
    return next((mode for mode in MODES.values() if mode.problem(spec) is None), None)


def nearest_mode(spec: QuantSpec) -> Mode:
    """Return the mode with the same element type and the closest number of bits."""
    return min(
        MODES.values(),
        key=lambda mode: (mode.type != spec.type, min(abs(bits - spec.num_bits) for bits in mode.bits)),
    )
