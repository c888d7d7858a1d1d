"""The checkpoint layouts of GPTQ and AWQ: which quantization they hold, and how its codes are packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qatkit.common.tables import Table
from qatkit.export.mlx.packing import pack
from qatkit.spec import QuantSpec

Array = np.ndarray[Any, Any]

WORD = 32
"""Bits of a packed word."""


@dataclass(frozen=True)
class Layout:
    """A checkpoint layout, with the name of its export format."""

    name: str
    """The name of the format, and ``quant_method`` in ``config.json``."""
    bits: tuple[int, ...]
    """The supported bit widths."""
    group_sizes: tuple[int, ...]
    """The supported numbers of inputs per scale; scales per output channel are supported, too."""
    arrays: Callable[[Array, Array, Array, QuantSpec], dict[str, Array]]
    """``(codes [out, in], scales [out, groups], zero points [out, groups], spec)``: return the arrays of the file by
    suffix, from unsigned codes and zero points.
    """
    config: Callable[[QuantSpec, Mapping[str, Any]], dict[str, Any]]
    """``(spec, layers)``: return ``quantization_config`` without ``quant_method``; see `qatkit.export.gptq.content`."""


def group_size(spec: QuantSpec) -> int:
    """Return the group size as the config stores it: -1 for one scale per output channel."""
    return -1 if spec.group_size is None else spec.group_size


def is_version_1(spec: QuantSpec) -> bool:
    """Whether zero points are stored minus 1, as in the first version of GPTQ's layout.

    It cannot store a zero point of 0, but symmetric codes never have one, and more programs read it.
    """
    return spec.symmetric


def _gptq(codes: Array, scales: Array, zero_points: Array, spec: QuantSpec) -> dict[str, Array]:
    inputs, groups = codes.shape[1], scales.shape[1]
    stored = zero_points.T - (1 if is_version_1(spec) else 0)
    return {
        "qweight": np.ascontiguousarray(pack(codes, spec.num_bits).T),
        "qzeros": pack(stored, spec.num_bits),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": (np.arange(inputs) // (inputs // groups)).astype(np.int32),
    }


def _awq(codes: Array, scales: Array, zero_points: Array, spec: QuantSpec) -> dict[str, Array]:
    return {
        "qweight": pack(_interleaved(codes.T), spec.num_bits),
        "qzeros": pack(_interleaved(zero_points.T), spec.num_bits),
        "scales": np.ascontiguousarray(scales.T),
    }


def _interleaved(values: Array) -> Array:
    """The order of AWQ's GEMM kernel: of eight output channels, first those with even numbers."""
    return values.reshape(len(values), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(values.shape)


def _gptq_config(spec: QuantSpec, layers: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "bits": spec.num_bits,
        "group_size": group_size(spec),
        "sym": spec.symmetric,
        "desc_act": False,
        "checkpoint_format": "gptq" if is_version_1(spec) else "gptq_v2",
        "block_name_to_quantize": layers["blocks"],
        "modules_in_block_to_quantize": [[name] for name in layers["names"]],
    }


def _awq_config(spec: QuantSpec, layers: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "bits": spec.num_bits,
        "group_size": group_size(spec),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": layers["others"],
    }


LAYOUTS = Table(
    "checkpoint layout",
    [
        Layout("gptq", (2, 3, 4, 8), (16, 32, 64, 128, 256, 512, 1024), _gptq, _gptq_config),
        Layout("awq", (4,), (16, 32, 64, 128), _awq, _awq_config),
    ],
)
"""Every layout by name."""
