"""The Pareto front and the best files of a sweep, on results that are easy to check by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qatkit.trials.best import best_files, dense_result
from qatkit.trials.results import Result
from qatkit.trials.tables import comparable, numbers, pareto, result_table


def result(
    trial: int, kind: str, accuracy: float, size: int, latency: float, passed: bool = True, data: str = "digits"
) -> Result:
    row: dict[str, Any] = {
        "stage": kind, "file": kind, "format": "onnx", "kind": kind,
        "test_accuracy": accuracy, "test_perplexity": 1 / accuracy if accuracy else math.inf, "test_loss": 1.0,
        "bytes": size, "layers": [], "latency": [{"batch_size": 1, "median_ms": latency}],
        "verification": {"task": "classification", "passed": passed, "runtime_metric": accuracy},
    }  # fmt: skip
    return Result([trial], {"data.args.path": data, "stages.qat.bits": trial}, True, row, data)


DENSE = result(1, "dense", 0.90, 1000, 5.0)
INT8 = result(2, "trained", 0.895, 300, 3.0)
INT4 = result(3, "trained", 0.885, 150, 4.0)
INT2 = result(4, "trained", 0.80, 80, 6.0)
BROKEN = result(5, "trained", 0.99, 10, 0.1, passed=False)
ALL = [DENSE, INT8, INT4, INT2, BROKEN]


def test_the_smallest_and_the_fastest_file_within_a_loss_of_accuracy_points() -> None:
    found = {(each.limit, each.goal): (each.result.trials[0], each.value) for each in best_files(ALL)}
    assert found["not worse", "size"] == (1, "1.0 kB")
    assert found["at most 0.5 points worse", "size"] == (2, "0.3 kB")
    assert found["at most 1 point worse", "size"] == (2, "0.3 kB")
    assert found["at most 2 points worse", "size"] == (3, "0.1 kB")
    assert found["at most 2 points worse", "latency, batch of 1"] == (2, "3.000 ms")
    assert found["at most 5 points worse", "size"] == (3, "0.1 kB")


def test_a_loss_of_perplexity_is_relative_to_the_dense_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ALL:
        monkeypatch.setitem(each.row["verification"], "task", "causal")
    # 0.90 / 0.895 is 0.56% worse, 0.90 / 0.885 1.7%
    found = {each.limit: each.result.trials[0] for each in best_files(ALL) if each.goal == "size"}
    assert found == {
        "not worse": 1, "at most 0.5% worse": 1, "at most 1% worse": 2, "at most 2% worse": 3, "at most 5% worse": 3,
    }  # fmt: skip


def test_losses_are_relative_to_the_best_dense_file_and_without_one_there_are_none() -> None:
    worse = result(6, "dense", 0.88, 1000, 5.0)
    assert dense_result([worse, *ALL]) is DENSE
    assert best_files([INT8, INT4]) == []


def test_the_front_leaves_out_files_that_failed_verification() -> None:
    slow = result(7, "trained", 0.895, 300, 3.5)
    assert pareto([*ALL, slow]) == [True, True, True, True, False, False]


def test_the_table_has_the_values_of_each_result_with_short_names() -> None:
    columns, rows = result_table(ALL, ["stages.qat.bits", "stages.qat.lr"])
    assert columns[:3] == ["stage", "bits", "lr"]
    assert [cell for cell, _ in rows[1][:3]] == ["trained", "2", "-"]
    assert rows[1][6] == ("0.3 kB", "3.33x smaller")
    assert rows[4][-1] == ("FAILED", "")


def test_numbers_of_trials_are_ranges() -> None:
    assert numbers([4, 1, 2, 3, 8, 6]) == "1-4, 6, 8"


def test_files_are_compared_only_on_the_same_test_data() -> None:
    """An easy test set would otherwise supply the reference and all of the best files."""
    hard, easy = result(6, "dense", 0.60, 1000, 5.0, data="hard"), result(7, "trained", 0.59, 300, 3.0, data="hard")
    (first, ours), (second, theirs) = comparable([*ALL, hard, easy])
    assert (first, ours) == ("path=digits", ALL)
    assert (second, theirs) == ("path=hard", [hard, easy])
    best = {each.limit: each.result for each in best_files(theirs) if each.goal == "size"}
    assert best["at most 1 point worse"] is easy
    assert comparable(ALL) == [("", ALL)]


def test_a_metric_that_is_not_a_number_is_neither_a_reference_nor_a_best_file() -> None:
    undefined = result(6, "dense", math.nan, 10, 0.1)
    assert dense_result([undefined, *ALL]) is DENSE
    assert undefined not in [each.result for each in best_files([undefined, *ALL])]
    assert best_files([undefined]) == []
    assert pareto([undefined, INT8]) == [False, True]


def test_a_loss_relative_to_zero_is_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (DENSE, INT8):
        monkeypatch.setitem(each.row["verification"], "task", "causal")
    monkeypatch.setitem(DENSE.row, "test_perplexity", 0.0)
    assert {each.result.trials[0] for each in best_files([DENSE, INT8])} == {1}
