"""The tensors of nested outputs: found, rebuilt, described, and compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from qatkit.export.output_tensors import difference, distances, finite, kinds, nested, tensors


@dataclass
class Boxes:
    corners: torch.Tensor
    scores: torch.Tensor


A, B, C = torch.zeros(2, 3), torch.ones(4), torch.full((1,), 2.0)


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (A, [""]),
        ((A, [B, C]), ["0", "1.0", "1.1"]),
        ({"X": A, "heads": [{"boxes": B}]}, ["X", "heads.0.boxes"]),
        (Boxes(A, B), ["corners", "scores"]),
        ({"loss": None, "logits": A}, ["logits"]),
    ],
    ids=["tensor", "sequences", "mappings", "dataclass", "other values"],
)
def test_tensors_are_named_by_their_place(outputs: Any, names: list[str]) -> None:
    assert list(tensors(outputs)) == names


def test_nested_rebuilds_what_tensors_took_apart() -> None:
    outputs = {"X": A, "heads": ({"boxes": B}, C)}
    assert nested(tensors(outputs)) == outputs
    assert nested(tensors(A)) is A


def test_outputs_are_described_by_their_type_and_their_tensors() -> None:
    assert kinds(A) == "Tensor [2, 3]"
    assert kinds([A, {"b": B}]) == "list with '0' [2, 3], '1.b' [4]"
    assert kinds(3) == "int"


def test_the_distance_of_each_output_adds_up_differences_and_keeps_the_largest() -> None:
    ours, theirs = (A, B), (A + 0.5, B - torch.tensor([0.25, 0.5, 0.0, 0.0]))
    assert distances(ours, theirs) == {"0": (6 * 0.5, 0.5), "1": (0.75, 0.5)}
    assert distances(ours, ours) == {"0": (0.0, 0.0), "1": (0.0, 0.0)}


def test_sums_of_differences_do_not_lose_digits() -> None:
    gaps = torch.cat([torch.tensor([1e8]), torch.ones(1000)])
    assert difference(torch.zeros(1001), gaps) == (1e8 + 1000, 1e8)


def test_integers_differ_by_one_or_not_at_all() -> None:
    assert difference(torch.tensor([1, 2, 3]), torch.tensor([1, 7, 9])) == (2.0, 1.0)
    assert difference(torch.tensor([True, False]), torch.tensor([True, True])) == (1.0, 1.0)


def test_complex_numbers_differ_by_the_length_of_their_difference() -> None:
    assert difference(torch.tensor([1 + 1j, 2]), torch.tensor([4 + 5j, 2])) == (5.0, 5.0)


def test_equal_infinities_do_not_differ_and_others_do() -> None:
    inf = torch.inf
    assert difference(torch.tensor([inf, -inf, 1.0]), torch.tensor([inf, -inf, 1.5])) == (0.5, 0.5)
    assert difference(torch.tensor([inf, 0.0]), torch.tensor([-inf, 0.0])) == (inf, inf)
    assert difference(torch.tensor([-inf]), torch.tensor([0.0])) == (inf, inf)
    assert all(math.isnan(gap) for gap in difference(torch.tensor([math.nan]), torch.tensor([math.nan])))


def test_only_values_that_are_finite_in_both_are_kept() -> None:
    ours, theirs = torch.tensor([1.0, torch.inf, 2.0, torch.nan]), torch.tensor([3.0, 1.0, -torch.inf, 1.0])
    assert [part.tolist() for part in finite(ours, theirs)] == [[1.0], [3.0]]


def test_empty_outputs_do_not_differ() -> None:
    assert difference(torch.zeros(0, 4), torch.zeros(0, 4)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({"b": A, "a": B}, {"c": A}, r"^outputs \['c'\] instead of \['a', 'b'\]$"),
        ({"b": A}, {"b": B}, r"^output 'b' has shape \[4\] instead of \[2, 3\]$"),
        (A, B, r"^shape \[4\] instead of \[2, 3\]$"),
    ],
)
def test_a_missing_output_and_another_shape_are_named(ours: Any, theirs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distances(ours, theirs)
