"""The bytes of GGUF's K-quants: super-blocks of 256 weights, with integer scales under float16 steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qatkit.export.gguf.bits import Array, float16, joined, packed_bits, read_float16, unpacked_bits


@dataclass(frozen=True)
class SuperBlocks:
    """The numbers of a weight, by super-block ``[out, super-blocks, ...]``."""

    codes: Array
    """Unsigned codes ``[..., 256]``."""
    scales: Array
    """Integer scales ``[..., groups]``."""
    minima: Array
    """Integer minima ``[..., groups]``."""
    steps: tuple[Array, ...]
    """The bytes of the step of the scales and, if there are minima, of theirs."""


@dataclass(frozen=True)
class Layout:
    """Where a K-quant has its numbers."""

    pack: Callable[[SuperBlocks], Array]
    steps: slice
    """The bytes of the float16 steps in a super-block."""
    scales: slice
    """The bytes of the integer scales and minima."""
    unpack: Callable[[Array], Array]
    """``(bytes of the scales)``: return the integers ``[..., groups]`` of the scales and, after them, of the minima."""

    def bytes(self, codes: Array, scales: Array, minima: Array, steps: Array, lowest: int) -> Array:
        """Return the bytes ``[out, bytes of a row]``.

        Args:
            codes: Codes ``[out, in]``.
            scales: Scales ``[out, groups]``, which are multiples of the steps.
            minima: Minima ``[out, groups]``.
            steps: Steps ``[out, super-blocks, 1 or 2]``.
            lowest: The smallest code.
        """
        blocks = steps.shape[:2]
        integers = [
            _integers(values.reshape(*blocks, -1), steps[..., i : i + 1])
            for i, values in enumerate((scales, minima)[: steps.shape[2]])
        ]
        unsigned = (codes.astype(np.int16) - lowest).astype(np.uint8).reshape(*blocks, -1)
        halves = tuple(float16(steps[..., i]) for i in range(steps.shape[2]))
        return joined(self.pack(SuperBlocks(unsigned, integers[0], integers[-1], halves)))

    def read(self, blocks: Array) -> Array:
        """Return the steps, scales and minima ``[..., numbers]`` of super-blocks ``[..., bytes]``."""
        steps = read_float16(blocks[..., self.steps])
        integers = self.unpack(blocks[..., self.scales]).astype(np.float32)
        own = steps.repeat(integers.shape[-1] // steps.shape[-1], axis=-1)
        return np.concatenate([steps, own * integers], axis=-1)


def _integers(values: Array, steps: Array) -> Array:
    integers = np.rint(values / steps)
    assert np.array_equal(integers.astype(np.float32) * steps, values), "training rounds to multiples of the steps"
    return integers.astype(np.int16)


def _six_bit_pairs(scales: Array, minima: Array) -> Array:
    """Eight scales and eight minima of 6 bits: the first four whole, with two high bits of the last four."""
    scales, minima = scales.astype(np.uint8), minima.astype(np.uint8)
    first = [part[..., :4] | (part[..., 4:] >> 4 << 6) for part in (scales, minima)]
    return np.concatenate([*first, scales[..., 4:] & 15 | (minima[..., 4:] & 15) << 4], axis=-1)


def _read_six_bit_pairs(stored: Array) -> Array:
    scales, minima, low = stored[..., :4], stored[..., 4:8], stored[..., 8:]
    parts = [scales & 63, low & 15 | scales >> 6 << 4, minima & 63, low >> 4 | minima >> 6 << 4]
    return np.concatenate(parts, axis=-1)


def _q2_k(block: SuperBlocks) -> Array:
    scales = packed_bits(np.concatenate([block.scales, block.minima], axis=-1), 4, 16)
    return np.concatenate([scales, packed_bits(block.codes, 2, 32), *block.steps], axis=-1)


def _q3_k(block: SuperBlocks) -> Array:
    scales = (block.scales + 32).astype(np.uint8)
    parts = [packed_bits(block.codes >> 2, 1, 32), packed_bits(block.codes & 3, 2, 32)]
    parts += [packed_bits(scales & 15, 4, 8), packed_bits(scales >> 4, 2, 4)]
    return np.concatenate([*parts, *block.steps], axis=-1)


def _q4_k(block: SuperBlocks) -> Array:
    scales = _six_bit_pairs(block.scales, block.minima)
    return np.concatenate([*block.steps, scales, packed_bits(block.codes, 4, 32)], axis=-1)


def _q5_k(block: SuperBlocks) -> Array:
    scales = _six_bit_pairs(block.scales, block.minima)
    parts = [packed_bits(block.codes >> 4, 1, 32), packed_bits(block.codes & 15, 4, 32)]
    return np.concatenate([*block.steps, scales, *parts], axis=-1)


def _q6_k(block: SuperBlocks) -> Array:
    parts = [packed_bits(block.codes & 15, 4, 64), packed_bits(block.codes >> 4, 2, 32)]
    return np.concatenate([*parts, block.scales.astype(np.int8).view(np.uint8), *block.steps], axis=-1)


def _read_q3_k(stored: Array) -> Array:
    low, high = unpacked_bits(stored[..., :8], 4, 8), unpacked_bits(stored[..., 8:], 2, 4)
    integers: Array = (low | high << 4).astype(np.int16) - 32
    return integers


LAYOUTS = {
    "Q2_K": Layout(_q2_k, slice(80, 84), slice(0, 16), lambda stored: unpacked_bits(stored, 4, 16)),
    "Q3_K": Layout(_q3_k, slice(108, 110), slice(96, 108), _read_q3_k),
    "Q4_K": Layout(_q4_k, slice(0, 4), slice(4, 16), _read_six_bit_pairs),
    "Q5_K": Layout(_q5_k, slice(0, 4), slice(4, 16), _read_six_bit_pairs),
    "Q6_K": Layout(_q6_k, slice(208, 210), slice(192, 208), lambda stored: stored.view(np.int8)),
}
"""Every K-quant by its name in GGUF."""
