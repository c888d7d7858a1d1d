"""The lowest scores equal those of a stable sort in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qatkit import QatkitError
from qatkit.pruning.selection import lowest

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sorted_reference(scores: dict[str, Tensor], count: int, signed: bool) -> dict[str, Tensor]:
    flat = torch.cat([tensor.double().flatten() for tensor in scores.values()])
    order = (flat if signed else flat.abs()).sort(stable=True).indices
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[order[:count]] = False
    parts = kept.split([tensor.numel() for tensor in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def drawn(dtypes: Sequence[torch.dtype], scale: float, seed: int) -> dict[str, Tensor]:
    """Tensors with many ties: a third are zeros of either sign, a third are rounded."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for index, dtype in enumerate(dtypes):
        x = torch.randn(5 + index, 40, generator=generator) * scale
        kind = torch.randint(3, x.shape, generator=generator)
        rounded = (x / scale).round() * scale
        tensors[str(index)] = torch.where(kind == 0, x * 0, torch.where(kind == 1, rounded, x)).to(dtype)
    return tensors


@settings(max_examples=150, deadline=None)
@given(
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    scale=st.sampled_from([1e-42, 1e-5, 1.0, 1000.0]),
    share=st.floats(0, 1, exclude_max=True),
    signed=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_the_lowest_scores_equal_those_of_a_stable_sort(
    dtypes: list[torch.dtype], scale: float, share: float, signed: bool, seed: int
) -> None:
    scores = drawn(dtypes, scale, seed)
    count = int(share * sum(tensor.numel() for tensor in scores.values()))
    masks, expected = lowest(scores, count, signed), sorted_reference(scores, count, signed)
    assert sum(int((~mask).sum()) for mask in masks.values()) == count
    for name, mask in masks.items():
        assert torch.equal(mask, expected[name]), name


def test_ties_across_chunks_are_broken_by_index() -> None:
    scores = {"a": torch.ones(300_000), "b": torch.ones(600_000)}
    masks = lowest(scores, 700_000)
    assert not masks["a"].any()
    assert torch.equal(masks["b"].nonzero().flatten(), torch.arange(400_000, 600_000))


def test_a_tensor_that_is_not_contiguous_is_read_in_the_order_of_its_indices() -> None:
    weight = torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last)
    assert torch.equal(lowest({"w": weight}, 100)["w"], lowest({"w": weight.contiguous()}, 100)["w"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_value_is_an_error_that_names_the_layer(dtype: torch.dtype, signed: bool, value: float) -> None:
    damaged = torch.ones(4, dtype=dtype)
    damaged[2] = value
    with pytest.raises(
        QatkitError, match=r"layer 'net.2' has non-finite scores, which cannot be ranked \(1 in total\)"
    ):
        lowest({"net.0": torch.ones(4, dtype=dtype), "net.2": damaged}, 3, signed)


def test_the_largest_finite_values_are_finite() -> None:
    for dtype in DTYPES:
        largest = torch.finfo(dtype).max
        masks = lowest({"w": torch.tensor([largest, -largest, 0.0], dtype=dtype)}, 1, signed=True)
        assert masks["w"].tolist() == [True, False, True]


def test_another_dtype_is_refused() -> None:
    with pytest.raises(
        QatkitError, match=r"scores of layer 'w' are torch.float64, which cannot be ranked; use float32"
    ):
        lowest({"w": torch.ones(4, dtype=torch.float64)}, 1)
