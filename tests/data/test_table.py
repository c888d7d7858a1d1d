"""Tables: vectors that are standardized on the training split only, and bad rows that are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from qatkit import QatkitError, QatkitWarning
from qatkit.data import Source, table_classification, table_regression
from tests.data.files import houses, write_csv

INPUTS: dict[str, Any] = {"numeric": ["size", "age"], "categorical": {"town": ["north", "south"]}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def source(path: Path, **options: Any) -> Source:
    return Source(str(path), val_fraction=0.2, test_fraction=0.2, **options)


def test_numbers_are_standardized_on_the_training_split_and_categories_are_one_hot(tmp_path: Path) -> None:
    table = houses()
    data = table_classification(source(write_csv(tmp_path / "h.csv", table)), ["cheap", "dear"], **INPUTS)
    (train, labels), (test, _) = data.train.tensors, data.test.tensors  # type: ignore[attr-defined]
    assert train.shape[1] == 4
    assert torch.allclose(train[:, :2].mean(0), torch.zeros(2), atol=1e-6)
    assert torch.allclose(train[:, :2].std(0, correction=0), torch.ones(2), atol=1e-6)
    assert test[:, :2].mean(0).abs().max() > 1e-3  # with the statistics of the training split
    assert torch.equal(train[:, 2:].sum(1), torch.ones(len(train)))
    size, south, dear = train[:, 0], train[:, 3], labels == 1
    assert size[(south == 0) & dear].min() > size[(south == 0) & ~dear].max()
    assert sum(len(split) for split in (data.train, data.val, data.test)) == 240  # type: ignore[arg-type]


def test_a_parquet_file_has_the_same_rows_and_several_targets_keep_their_units(tmp_path: Path) -> None:
    table = houses()
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "h.parquet")
    data = table_regression(source(tmp_path / "h.parquet"), ["price", "rent"], **INPUTS, batch_size=200)
    inputs, targets = next(iter(data.test_dataloader()))
    assert inputs.dtype == targets.dtype == torch.float32
    known = {(round(p, 4), round(r, 4)) for p, r in zip(table["price"], table["rent"], strict=True)}  # type: ignore[call-overload]
    assert {(round(p, 4), round(r, 4)) for p, r in targets.tolist()} <= known


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (["", 1, "north", 1, 1, "dear"], "column 'size' is empty"),
        (["nan", 1, "north", 1, 1, "dear"], "column 'size' contains 'nan', not a finite number"),
        (["big", 1, "north", 1, 1, "dear"], "column 'size' contains 'big', not a finite number"),
        ([1, 1, "west", 1, 1, "dear"], r"column 'town' contains 'west', which is none of \['north', 'south'\]"),
        ([1, 1, "north", 1, 1, "free"], r"label \"free\" is neither one of \['cheap', 'dear'\] nor an index"),
    ],
)
def test_a_bad_row_is_named_or_skipped(row: list[object], problem: str, tmp_path: Path) -> None:
    table = {column: [*values, bad] for (column, values), bad in zip(houses(60).items(), row, strict=True)}
    path = write_csv(tmp_path / "h.csv", table)
    with pytest.raises(QatkitError, match=rf"^.*h\.csv:62: {problem}.*skip_bad"):
        table_classification(source(path), ["cheap", "dear"], **INPUTS).prepare_data()
    with pytest.warns(QatkitWarning, match=r"skipped 1 of 61 records; first: .*h\.csv:62"):
        table_classification(source(path, skip_bad=True), ["cheap", "dear"], **INPUTS).prepare_data()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "numeric: no input column is named"),
        ({"numeric": ["size", "price"]}, "numeric: column 'price' is named more than once"),
        ({"categorical": {"town": ["north"]}}, r"categorical\.town: \['north'\] is not a list of two or more"),
        ({"numeric": ["height"]}, r".*h\.csv:2: has no column 'height', only \['age', "),
    ],
)
def test_columns_that_cannot_be_inputs_are_refused(arguments: Any, message: str, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "h.csv", houses(20))
    with pytest.raises(QatkitError, match=f"^{message}"):
        table_regression(source(path), ["price"], **arguments).prepare_data()


def test_a_training_set_smaller_than_a_batch_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    data = table_regression(source(write_csv(tmp_path / "h.csv", houses(20))), ["price"], **INPUTS, batch_size=64)
    with pytest.raises(QatkitError, match=r"^batch_size: 64 is more than the \d+ training samples of a process"):
        data.train_dataloader()
    (tmp_path / "empty.csv").touch()
    with pytest.raises(QatkitError, match="there is no valid record"):
        table_regression(source(tmp_path / "empty.csv"), ["price"], **INPUTS).prepare_data()
