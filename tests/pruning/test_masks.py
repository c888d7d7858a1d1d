"""Masks against definitions written out in plain Python, and against torch's own pruning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from qatkit import QatkitError
from qatkit.pruning.masks import (
    apply_mask,
    block_mask,
    check_floor,
    check_nm_pair,
    count_zeros,
    global_masks,
    magnitude_mask,
    nm_mask,
    nonzeros,
)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.73, 0.95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_count_is_exact_in_every_dtype(sparsity: float, dtype: torch.dtype) -> None:
    mask = magnitude_mask(torch.randn(77, 131).to(dtype), sparsity)
    assert (~mask).sum().item() == round(sparsity * 77 * 131)


def test_masks_over_the_model_equal_those_of_torch_without_ties() -> None:
    layers = [nn.Linear(40, 30), nn.Linear(30, 50)]
    masks = global_masks({str(i): layer.weight for i, layer in enumerate(layers)}, 0.6)
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.6)
    for index, layer in enumerate(layers):
        assert torch.equal(masks[str(index)], layer.weight_mask.bool())


def nm_by_definition(weight: Tensor, n: int, m: int) -> Tensor:
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], m):
            values = [(abs(weight[row, start + i].item()), i) for i in range(m)]
            for _, i in sorted(values)[-n:]:
                mask[row, start + i] = True
    return mask


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (2, 3)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rounded=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_nm_keeps_the_n_largest_of_every_m_inputs(
    pattern: tuple[int, int], dtype: torch.dtype, rounded: bool, seed: int
) -> None:
    n, m = pattern
    weight = torch.randn(3, 5 * m, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight = weight.round() if rounded else weight  # with ties
    mask = nm_mask(weight, n, m)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, nm_by_definition(weight, n, m))


def test_two_of_four_is_right_for_every_order_and_every_tie() -> None:
    weight = torch.cartesian_prod(*[torch.arange(4.0)] * 4)
    assert torch.equal(nm_mask(weight, 2, 4), nm_by_definition(weight, 2, 4))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4)])
def test_a_group_with_a_non_finite_value_is_refused(pattern: tuple[int, int], value: float) -> None:
    # 3 > nan, nan > 5 and 5 > 2: by comparisons alone one of four would be kept
    with pytest.raises(QatkitError, match=r"layer 'head' has non-finite scores, .*; lower the learning rate if"):
        nm_mask(torch.tensor([[3.0, value, 5.0, 2.0]]), *pattern, name="head")


def test_a_non_finite_value_is_found_anywhere_in_a_large_weight() -> None:
    for row in (0, -1):
        weight = torch.ones(3, 1 << 18)
        weight[row, 0] = torch.nan
        with pytest.raises(QatkitError, match="non-finite"):
            nm_mask(weight, 2, 4)


def test_the_groups_of_a_convolution_are_input_channels() -> None:
    weight = torch.randn(6, 8, 3, 2)
    mask = nm_mask(weight, 2, 4)
    assert mask.shape == weight.shape
    for y in range(3):
        for x in range(2):
            assert torch.equal(mask[:, :, y, x], nm_by_definition(weight[:, :, y, x], 2, 4))


def test_the_mask_of_a_large_weight_equals_the_masks_of_its_parts() -> None:
    for n, m in ((2, 4), (5, 32), (2, 3)):
        weight = torch.randn(1000, 1024 // m * m)
        assert torch.equal(nm_mask(weight, n, m), torch.cat([nm_mask(part, n, m) for part in weight.split(7)]))


def test_whole_blocks_with_the_smallest_sums_are_pruned() -> None:
    weight = torch.randn(12, 20)
    mask = block_mask(weight, 0.4, (4, 5))
    blocks = mask.view(3, 4, 4, 5).transpose(1, 2).reshape(12, 20)
    assert (blocks.all(dim=1) | ~blocks.any(dim=1)).all()
    assert (~blocks.any(dim=1)).sum() == round(0.4 * 12)
    sums = weight.double().abs().view(3, 4, 4, 5).transpose(1, 2).reshape(12, 20).sum(dim=1)
    assert sums[~blocks.any(dim=1)].max() < sums[blocks.any(dim=1)].min()


def test_a_block_of_a_convolution_holds_whole_kernels() -> None:
    weight = torch.randn(8, 4, 3, 3)
    mask = block_mask(weight, 0.5, (2, 2))
    assert torch.equal(mask, mask[:, :, :1, :1].expand(8, 4, 3, 3))
    assert (~mask).sum() == weight.numel() // 2


def test_a_block_of_a_one_dimensional_convolution_holds_whole_kernels() -> None:
    weight = torch.randn(4, 4, 5)
    mask = block_mask(weight, 0.5, (2, 2))
    sums = weight.abs().sum(-1).view(2, 2, 2, 2).sum(dim=(1, 3))
    kept = sums > sums.flatten().sort().values[1]
    assert torch.equal(mask, kept.repeat_interleave(2, 0).repeat_interleave(2, 1)[:, :, None].expand(4, 4, 5))


@pytest.mark.parametrize("block", [(16,), (2, 0), (1, 2, 3)])
def test_what_is_no_block_is_refused_by_its_key_and_its_value(block: tuple[int, ...]) -> None:
    with pytest.raises(QatkitError) as caught:
        block_mask(torch.ones(4, 10), 0.5, block)  # type: ignore[arg-type]
    assert str(caught.value) == f"block: {list(block)} is not a block shape; use [rows, columns], such as [16, 16]"


def test_errors_about_a_block_mask_name_the_key_or_the_layer() -> None:
    with pytest.raises(QatkitError) as caught:
        block_mask(torch.ones(4, 10), 1.5, (2, 2))
    assert caught.value.key == "sparsity"
    with pytest.raises(QatkitError, match="layer 'conv1'"):
        block_mask(torch.ones(4, 10), 0.5, (3, 2), name="conv1")
    with pytest.raises(QatkitError, match="layer 'conv1'"):
        block_mask(torch.ones(2, 2), 0.9, (1, 2), name="conv1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pruned_values_become_zero_even_if_non_finite_and_the_others_stay(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    tensor = torch.randn(4, 4, 3, 3, dtype=dtype).to(memory_format=layout)
    tensor[0, 0, 0] = torch.tensor([float("nan"), float("inf"), -0.0])
    mask = torch.rand(4, 4, 3, 3) > 0.5
    mask[0, 0, 0] = False
    expected = torch.where(mask, tensor, 0)
    apply_mask(tensor, mask)
    assert torch.equal(tensor, expected)
    assert not tensor[0, 0, 0].signbit().any()


def test_the_zeros_of_a_weight_are_its_mask() -> None:
    weight = nn.Parameter(torch.tensor([[0.0, -0.0, 1e-45], [float("nan"), -2.0, 0.0]]))
    assert nonzeros(weight).tolist() == [[False, False, True], [True, True, False]]
    assert nonzeros(weight.T).tolist() == [[False, True], [False, True], [True, False]]


def test_the_zeros_of_each_layer_are_counted() -> None:
    assert count_zeros({"a": torch.tensor([[0.0, -0.0, 1e-45]]), "b": torch.ones(2)}) == {"a": 2, "b": 0}


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 50, float("nan")])
def test_a_sparsity_out_of_range_is_an_error(sparsity: float) -> None:
    with pytest.raises(QatkitError, match=r"sparsity: .* is out of range; use a non-negative fraction below 1"):
        magnitude_mask(torch.ones(8), sparsity)


def test_a_layer_that_would_lose_all_its_weights_is_an_error() -> None:
    with pytest.raises(QatkitError, match=r"layer 'weight' would keep 0 of its 8 weights"):
        magnitude_mask(torch.ones(8), 0.99)
    with pytest.raises(QatkitError, match=r"layer 'weight' would keep 0 of its 2 weights"):
        block_mask(torch.ones(2, 2), 0.9, (1, 2))
    with pytest.raises(QatkitError, match=r"layer 'a, b' would keep 0 of its 8 weights"):
        global_masks({"a": torch.ones(4), "b": torch.ones(4)}, 0.99)


@pytest.mark.parametrize(("kept", "total"), [(1, 1), (1, 2), (1, 1000), (2, 2000)])
def test_a_layer_may_keep_a_thousandth_of_its_weights(kept: int, total: int) -> None:
    check_floor("head", kept, total)


@pytest.mark.parametrize(("kept", "total"), [(0, 2), (0, 1000), (1, 1001), (2, 2001)])
def test_a_layer_that_keeps_less_than_a_thousandth_is_refused(kept: int, total: int) -> None:
    with pytest.raises(QatkitError) as caught:
        check_floor("head", kept, total)
    assert str(caught.value) == (
        f"layer 'head' would keep {kept} of its {total} weights, below the floor of 0.1%; use a lower sparsity or "
        "scope='layer', or exclude the layer"
    )


@pytest.mark.parametrize(("n", "m"), [(4, 2), (4, 4), (0, 4)])
def test_an_invalid_nm_pattern_is_an_error(n: int, m: int) -> None:
    with pytest.raises(
        QatkitError, match=rf"^nm: \[{n}, {m}\] would keep {n} of every {m} weights; use 0 < N < M, such as \[2, 4\]"
    ):
        nm_mask(torch.ones(4, 8), n, m)


@pytest.mark.parametrize("nm", ["2:4", "24", 2, {2, 4}, (2,), (1, 2, 4), (2.0, 4)])
def test_a_pattern_that_is_not_a_pair_of_integers_is_an_error(nm: Any) -> None:
    with pytest.raises(QatkitError) as caught:
        check_nm_pair(nm)
    assert str(caught.value) == f"nm: {nm!r} is not a pair of integers; use (2, 4)"


def test_inputs_that_a_pattern_does_not_divide_are_an_error_and_never_padded() -> None:
    with pytest.raises(
        QatkitError, match=r"groups of 4 do not divide the inputs of layer 'weight', .* \[4, 10\]; exclude"
    ):
        nm_mask(torch.ones(4, 10), 2, 4)
    for block in ((4, 3), (5, 2)):
        with pytest.raises(QatkitError, match=rf"blocks of {block[0]} x {block[1]} do not .*; exclude the layer$"):
            block_mask(torch.ones(4, 10), 0.5, block)
