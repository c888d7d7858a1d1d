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
from qatkit.export.gguf.packing import BLOCK_TYPES, BlockType, block_type_of, nearest_type
from qatkit.quantization.arithmetic import fake_quantize, quantize
from qatkit.quantization.estimators import QParams, computed_qparams, mse_qparams
from qatkit.quantization.scales import round_scale
from qatkit.quantization.slices import outer_shape, scale_shape
from qatkit.quantization.super_blocks import steps_of

TYPES = list(BLOCK_TYPES)


def weights(columns: int) -> Tensor:
    """Rows of very different sizes; a block and half a block of zeros, and a block with one outlier."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, columns, generator=generator) * torch.logspace(-4, 2, 12)[:, None]
    rows[1, :256] = 0
    rows[2, ::2] = 0
    rows[3, 5] = 1e4
    return rows


def pack(row: BlockType, w: Tensor, qparams: QParams) -> Any:
    outer = steps_of(*qparams, row.spec) if row.spec.super_blocks else torch.empty(0)
    return row.pack(*(part.numpy() for part in (quantize(w, *qparams, row.spec), *qparams, outer)))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("search", [computed_qparams, mse_qparams])
def test_the_gguf_package_decodes_the_trained_values_and_zeros(name: str, search: Any) -> None:
    row, w = BLOCK_TYPES[name], weights(512)
    qparams = search(w, row.spec)
    packed = pack(row, w, qparams)
    decoded = gguf_dequantize(packed, GGMLQuantizationType[name])
    assert np.array_equal(decoded, fake_quantize(w, *qparams, row.spec).numpy())
    assert not row.spec.keeps_zeros or (decoded[w.numpy() == 0] == 0).all()
    read = row.read_scales(packed.reshape(len(w), 512 // row.block, -1))
    numbers = [part.view(*read.shape[:2], -1) for part in qparams[:1] if not row.spec.super_blocks]
    if row.spec.super_blocks:
        steps = steps_of(*qparams, row.spec)
        numbers = [part.view(*read.shape[:2], -1) for part in (steps, *qparams)[: 1 + steps.shape[2]]]
    assert np.array_equal(read, torch.cat(numbers, dim=-1).numpy())


@pytest.mark.parametrize("name", TYPES)
def test_a_block_has_the_size_that_the_gguf_package_states(name: str) -> None:
    row = BLOCK_TYPES[name]
    packed = pack(row, weights(256), computed_qparams(weights(256), row.spec))
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    assert (row.block, packed.shape) == (block, (12, 256 // block * size))


@pytest.mark.parametrize("name", TYPES)
def test_every_code_keeps_its_place_and_a_negative_scale_its_sign(name: str) -> None:
    row = BLOCK_TYPES[name]
    generator = torch.Generator().manual_seed(1)
    ternary = row.spec.type == "ternary"
    codes = torch.randint(3 if ternary else 2**row.spec.num_bits, (4, 512), generator=generator) - int(ternary)
    signed = row.spec.type == "int" and row.spec.symmetric
    codes = codes - 2 ** (row.spec.num_bits - 1) if signed else codes
    scale = torch.full(scale_shape(codes.shape, row.spec), 0.5).numpy()
    zero = torch.randint(2**row.spec.num_bits, scale.shape, generator=generator).numpy() * (not row.spec.symmetric)
    step = np.full(outer_shape(scale.shape, row.spec), 0.25, dtype=np.float32)
    zero = (zero % 16 * np.float32(0.25)) if row.spec.has_minimum else zero

    def decoded(sign: int) -> Any:
        signed = (sign * zero, sign * step) if row.spec.has_minimum else (zero, step)
        return gguf_dequantize(row.pack(codes.numpy(), sign * scale, *signed), GGMLQuantizationType[name])

    if row.spec.type == "nonlinear":
        assert len(np.unique(decoded(1))) == 16
    elif row.spec.is_float:
        magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # e2m1, in the order of the codes
        assert np.array_equal(decoded(1), np.concatenate([magnitudes, -magnitudes])[codes.numpy()] / 2)
    else:
        minimum = (zero * (1 if row.spec.has_minimum else np.float32(0.5))).repeat(row.spec.group_size, axis=1)
        assert np.array_equal(decoded(1), codes.numpy() * np.float32(0.5) - minimum)
        assert np.array_equal(decoded(-1), -decoded(1))


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_the_minimum_of_every_zero_point_is_a_float16_number_and_the_scale_is_close(name: str) -> None:
    """The product with every zero point is compared in float64, over the whole range of float16."""
    spec = BLOCK_TYPES[name].spec
    wide = torch.logspace(-9, 6, 4001)
    short = round_scale(wide, spec).double()
    minima = short[:, None] * torch.arange(2**spec.num_bits)
    assert torch.equal(minima, minima.half().double())
    normal = (wide > 2.0**-14) & (wide < 2.0 ** (16 - spec.num_bits))
    error = ((short - wide.double()) / wide.double()).abs()
    assert error[normal].max() <= 2.0 ** (spec.num_bits - 11)
    assert (short > 0).all()


def test_scales_that_are_not_of_the_stored_type_are_not_rounded_silently() -> None:
    codes = np.zeros((1, 64), dtype=np.int8)
    for name in ("Q8_0", "MXFP4", "NVFP4"):
        with pytest.raises(AssertionError, match="training rounds"):
            BLOCK_TYPES[name].pack(codes, np.full((1, 4), 0.1, dtype=np.float32), np.zeros((1, 4)), np.zeros(0))
    scale = np.array([[1.0009765625]], dtype=np.float32)  # of float16, but not its product with 13
    with pytest.raises(AssertionError, match="training rounds to float16"):
        BLOCK_TYPES["Q4_1"].pack(codes[:, :32], scale, np.array([[13.0]], dtype=np.float32), np.zeros(0))


def test_a_spec_has_one_type_or_a_nearest_one() -> None:
    for row in BLOCK_TYPES.values():
        assert block_type_of(row.spec) is row
    nearest = {QuantSpec(8): "Q8_0", QuantSpec(6): "Q6_K", QuantSpec(3): "Q3_K", QuantSpec(4, type="float"): "MXFP4"}
    assert [nearest_type(spec, 256).name for spec in nearest] == list(nearest.values())
    assert nearest_type(QuantSpec(4, symmetric=False), 256).name == "Q4_1"
    assert nearest_type(QuantSpec(2, type="ternary", observer="absmean"), 256).name == "TQ2_0"
    assert nearest_type(QuantSpec(3), 96).name == "Q4_0", "super-blocks do not divide 96 inputs"
    assert all(block_type_of(spec) is None for spec in nearest)
