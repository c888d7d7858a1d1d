"""Choosing formats under a budget, against every combination; and bytes, against packed arrays of other libraries."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qatkit import QatkitError, QuantSpec, Scheme, prepare_qat, scheme
from qatkit.quantization.mixed.allocation import allocate, totals
from qatkit.quantization.mixed.overrides import allocated_layers, plain_layers
from qatkit.quantization.mixed.records import Group, Option, Sensitivity, stored_bytes

W8, W4, W2 = (Scheme(QuantSpec(num_bits=bits)) for bits in (8, 4, 2))


def measured(*groups: dict[str, tuple[int, float]]) -> Sensitivity:
    """Groups of 8 weights, by candidate their bytes and increase."""
    return Sensitivity(
        1.0,
        {},
        tuple(
            Group((f"layer{index}",), 8, {name: Option(*option) for name, option in group.items()})
            for index, group in enumerate(groups)
        ),
    )


sizes = st.one_of(st.integers(1, 50), st.integers(1, 10**12))
increases = st.one_of(st.floats(-0.1, 2.0), st.floats(0, 1e-6), st.sampled_from([0.0, 0.5]))
groups = st.dictionaries(st.sampled_from("abcd"), st.tuples(sizes, increases), min_size=1)


@settings(max_examples=150, deadline=None)
@given(st.lists(groups, min_size=1, max_size=5), st.data())
def test_no_combination_within_the_budget_has_a_lower_sum(content: list[Any], data: st.DataObject) -> None:
    sensitivity = measured(*content)
    every = list(itertools.product(*(group.options.values() for group in sensitivity.groups)))
    size = [sum(option.bytes for option in combination) for combination in every]
    # budgets that are just met, or missed by one byte, are the hard ones
    budget = max(min(size), data.draw(st.sampled_from(size)) - data.draw(st.integers(0, 1)))
    found_bytes, found = totals(sensitivity, allocate(sensitivity, budget_bytes=budget))
    best = min(
        sum(max(option.increase, 0) for option in combination)
        for combination, total in zip(every, size, strict=True)
        if total <= budget
    )
    assert found_bytes <= budget
    assert found == pytest.approx(best, rel=1e-12, abs=1e-9 * 2.0)


def test_a_budget_is_kept_to_the_byte_where_the_solver_s_tolerance_is_more() -> None:
    huge = {"large": (2 * 10**12, 0.0), "small": (10**12, 1.0)}
    sensitivity = measured(huge, huge, huge)
    chosen = allocate(sensitivity, budget_bytes=6 * 10**12 - 1)
    assert totals(sensitivity, chosen) == (5 * 10**12, 1.0)


def test_an_increase_below_zero_is_noise_and_pays_for_nothing() -> None:
    sensitivity = measured({"int8": (8, 0.0), "int4": (4, -5.0)}, {"int8": (8, -9.0), "int4": (4, 0.1)})
    chosen = allocate(sensitivity, budget_bytes=16)
    assert chosen == {"layer0": "int4", "layer1": "int8"}
    assert totals(sensitivity, chosen) == (12, 0.0)


def test_average_bits_are_bytes_over_all_weights() -> None:
    sensitivity = measured({"int8": (8, 0.0), "int4": (4, 0.1)}, {"int8": (8, 0.0), "int4": (4, 0.2)})
    assert allocate(sensitivity, average_bits=6.0) == allocate(sensitivity, budget_bytes=12)
    assert allocate(sensitivity, average_bits=5.9) == allocate(sensitivity, budget_bytes=8)


def test_a_budget_that_cannot_be_met_is_refused_with_the_least_that_can() -> None:
    sensitivity = measured({"int8": (9, 0.0), "int4": (5, 0.1)}, {"int8": (8, 0.0)})
    with pytest.raises(
        QatkitError, match=r"budget_bytes: 12 is too small: the smallest formats take 13 bytes, 6\.5000"
    ):
        allocate(sensitivity, budget_bytes=12)
    with pytest.raises(QatkitError, match=r"average_bits: 6\.4 is too small: .* use 13 bytes or 6\.5 bits"):
        allocate(sensitivity, average_bits=6.4)
    assert allocate(sensitivity, average_bits=6.5) == {"layer0": "int4", "layer1": "int8"}
    for budgets in ({}, {"budget_bytes": 20, "average_bits": 8.0}):
        with pytest.raises(QatkitError, match="pass either budget_bytes or average_bits"):
            allocate(sensitivity, **budgets)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
def test_gguf_blocks_take_the_bytes_that_gguf_writes(name: str) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 96)).astype(np.float32)
    packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name])
    spec = scheme(name).weight
    assert spec is not None
    assert stored_bytes(weight.shape, spec) == packed.nbytes


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_take_the_bytes_that_compressed_tensors_packs_them_in(bits: int) -> None:
    codes = torch.zeros(16, 64, dtype=torch.int8)  # sizes at which its words of 32 bits have no gaps
    spec = QuantSpec(num_bits=bits, strategy="group", group_size=16, symmetric=False)
    zero_points = pack_to_int32(torch.zeros(16, 4, dtype=torch.int8), bits, packed_dim=0)
    expected = pack_to_int32(codes, bits).nbytes + torch.zeros(16, 4).nbytes + zero_points.nbytes
    assert stored_bytes(codes.shape, spec) == expected


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        (QuantSpec(num_bits=3, strategy="tensor"), [3, 5], 6 + 4),  # 45 bits
        (QuantSpec(num_bits=4), [5, 4, 3, 3], 90 + 5 * 4),
        (QuantSpec(num_bits=4, scale_dtype="bfloat16"), [5, 4], 10 + 5 * 2),
        (QuantSpec(num_bits=2, type="ternary", observer="absmean", strategy="tensor"), [4, 4], 4 + 4),
        (scheme("FP8_BLOCK").weight, [130, 256], 130 * 256 + 2 * 2 * 4),
        (scheme("MXFP6A16").weight, [2, 64], 96 + 4),  # one byte of scale for 32 values
        (scheme("NVFP4A16").weight, [2, 64], 64 + 8 + 4),
    ],
)
def test_bytes_are_codes_scales_and_zero_points_at_their_dtypes(
    spec: QuantSpec, shape: list[int], expected: int
) -> None:
    assert stored_bytes(shape, spec) == expected


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.layers[1].extra = nn.ModuleDict({"0": Block()})
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.named = nn.ModuleDict({"a[b]*": nn.Linear(4, 4), "ab": nn.Linear(4, 4)})


NAMES = [name for name, module in Deep().named_modules() if isinstance(module, nn.Linear)]


def allocation_of(formats: dict[str, str]) -> tuple[Sensitivity, dict[str, str]]:
    option = Option(1, 0.0)
    groups = tuple(Group((name,), 1, dict.fromkeys(["W8", "W4", "W2"], option)) for name in formats)
    others = tuple(name for name in NAMES if name not in formats)
    return Sensitivity(1.0, {"W8": W8, "W4": W4, "W2": W2}, groups, others), formats


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["W8", "W4", "W2"]), min_size=1))
def test_the_layers_of_an_allocation_give_every_layer_its_format_and_touch_no_other(formats: dict[str, str]) -> None:
    sensitivity, allocation = allocation_of(formats)
    model: Any = Deep()
    assert set(prepare_qat(model, layers=allocated_layers(sensitivity, allocation))) == set(formats)
    for name, candidate in formats.items():
        assert model.get_submodule(name).weight_fake_quant.spec == sensitivity.candidates[candidate].weight


def test_layers_that_differ_in_numbers_alone_are_joined_and_exceptions_follow() -> None:
    formats = dict.fromkeys(NAMES, "W4") | {"layers.2.up": "W8", "layers.1.extra.0.down": "W2"}
    layers = allocated_layers(*allocation_of(formats))
    # layers.*.up would catch layers.1.extra.0.up too, so those are written out
    assert layers["layers.2.up"] == W8
    assert not any("*" in glob for glob in layers if glob.startswith("layers"))
    shallow = {f"blocks.{index}.up": "W4" for index in range(4)} | {"blocks.2.up": "W8"}
    assert allocated_layers(*allocation_of(shallow)) == {"blocks.*.up": W4, "blocks.2.up": W8}


def test_a_scheme_is_written_by_its_name_and_a_spec_without_its_defaults() -> None:
    own = Scheme(QuantSpec(num_bits=8, observer="lsq"), QuantSpec(symmetric=False, strategy="tensor"))
    block = QuantSpec(type="float", strategy="block", block_structure=(64, 64))
    assert plain_layers({"a": scheme("W4A16"), "b": own, "c": Scheme(block)}) == {
        "a": {"scheme": "W4A16"},
        "b": {
            "weight": {"num_bits": 8, "observer": "lsq"},
            "activation": {"num_bits": 8, "symmetric": False, "strategy": "tensor"},
        },
        "c": {"weight": {"num_bits": 8, "strategy": "block", "type": "float", "block_structure": [64, 64]}},
    }


def test_a_measurement_survives_json_and_something_else_is_refused() -> None:
    sensitivity = Sensitivity(
        math.pi,
        {"W4A8": scheme("W4A8"), "FP8_BLOCK": scheme("FP8_BLOCK")},
        (Group(("a", "b"), 16, {"W4A8": Option(8, 1e-17), "FP8_BLOCK": Option(16, -0.1)}),),
        ("norm",),
        ("a sentence",),
    )
    assert Sensitivity.from_plain(json.loads(json.dumps(sensitivity.to_plain()))) == sensitivity
    for content in ([], {"loss": 1.0}, {**sensitivity.to_plain(), "candidates": {"x": {"weight": {"bits": 4}}}}):
        with pytest.raises(QatkitError, match="sensitivity: the file was not written by `qatkit sensitivity`"):
            Sensitivity.from_plain(content)
