"""Blocks of every GGUF type: the gguf package decodes the values of training, and reads the same scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from torch import Tensor

from qatkit import QuantSpec
from qatkit.export.gguf_packing import BLOCK_TYPES, block_type_of, nearest_type
from qatkit.quantization.arithmetic import fake_quantize, quantize
from qatkit.quantization.estimators import computed_qparams, mse_qparams

TYPES = list(BLOCK_TYPES)


def weights(columns: int) -> Tensor:
    """Rows of very different sizes; a block and half a block of zeros, and a block with one outlier."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, columns, generator=generator) * torch.logspace(-4, 2, 12)[:, None]
    rows[1, :256] = 0
    rows[2, ::2] = 0
    rows[3, 5] = 1e4
    return rows


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("search", [computed_qparams, mse_qparams])
def test_the_gguf_package_decodes_the_trained_values_and_zeros(name: str, search: Any) -> None:
    row, w = BLOCK_TYPES[name], weights(512)
    scale, zero_point = search(w, row.spec)
    packed = row.pack(quantize(w, scale, zero_point, row.spec).numpy(), scale.numpy())
    decoded = gguf_dequantize(packed, GGMLQuantizationType[name])
    assert np.array_equal(decoded, fake_quantize(w, scale, zero_point, row.spec).numpy())
    assert (decoded[w.numpy() == 0] == 0).all()
    read = row.read_scale(packed.reshape(*scale.shape, -1)[..., row.scale_bytes])
    assert np.array_equal(read, scale.numpy())


@pytest.mark.parametrize("name", TYPES)
def test_a_block_has_the_size_that_the_gguf_package_states(name: str) -> None:
    row = BLOCK_TYPES[name]
    scale, zero_point = computed_qparams(weights(256), row.spec)
    packed = row.pack(quantize(weights(256), scale, zero_point, row.spec).numpy(), scale.numpy())
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    assert (row.block, packed.shape) == (block, (12, 256 // block * size))


@pytest.mark.parametrize("name", TYPES)
def test_every_code_keeps_its_place_and_a_negative_scale_its_sign(name: str) -> None:
    row = BLOCK_TYPES[name]
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(2**row.spec.num_bits, (4, 512), generator=generator)
    codes = codes.clamp(max=2) - 1 if row.spec.type == "ternary" else codes
    codes = codes - 2 ** (row.spec.num_bits - 1) if row.spec.type == "int" else codes
    scale = torch.full((4, 512 // row.block), 0.5)
    signs = (1, 1) if row.spec.is_float else (1, -1)
    plain, turned = (
        gguf_dequantize(row.pack(codes.numpy(), (sign * scale).numpy()), GGMLQuantizationType[name]) for sign in signs
    )
    assert np.array_equal(turned, signs[1] * plain)
    if not row.spec.is_float:
        assert np.array_equal(plain, codes.numpy() * np.float32(0.5))


def test_scales_that_are_not_of_the_stored_type_are_not_rounded_silently() -> None:
    codes = np.zeros((1, 32), dtype=np.int8)
    for name in ("Q8_0", "MXFP4"):
        with pytest.raises(AssertionError, match="training rounds the scales"):
            BLOCK_TYPES[name].pack(codes, np.array([[0.1]], dtype=np.float32))


def test_a_spec_has_one_type_or_a_nearest_one() -> None:
    for row in BLOCK_TYPES.values():
        assert block_type_of(row.spec) is row
    nearest = {QuantSpec(8): "Q8_0", QuantSpec(6): "Q5_0", QuantSpec(3): "Q4_0", QuantSpec(4, type="float"): "MXFP4"}
    assert [nearest_type(spec).name for spec in nearest] == list(nearest.values())
    assert nearest_type(QuantSpec(2, type="ternary", observer="absmean")).name == "TQ2_0"
    assert all(block_type_of(spec) is None for spec in nearest)
