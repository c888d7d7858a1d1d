"""Tables: vectors that are standardized on the training split only, and bad rows that are named."""

from __future__ import annotations

import json
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
        ([1, 1, "west", 1, 1, "dear"], r"column 'town' contains 'west', which is not one of \['north', 'south'\]"),
        ([1e39, 1, "north", 1, 1, "dear"], r"column 'size' contains '1e\+39', which float32 cannot"),
        ([1, 1, "north", 1, 1, "free"], r"label \"free\" is neither one of \['cheap', 'dear'\] nor a class index"),
    ],
)
def test_a_bad_row_is_named_or_skipped(row: list[object], problem: str, tmp_path: Path) -> None:
    table = {column: [*values, bad] for (column, values), bad in zip(houses(60).items(), row, strict=True)}
    path = write_csv(tmp_path / "h.csv", table)
    with pytest.raises(QatkitError, match=rf"^.*h\.csv:62: {problem}.*skip_bad"):
        table_classification(source(path), ["cheap", "dear"], **INPUTS).prepare_data()
    with pytest.warns(QatkitWarning, match=r"skipped 1 of 61 records; first: .*h\.csv:62"):
        table_classification(source(path, skip_bad=True), ["cheap", "dear"], **INPUTS).prepare_data()


def test_a_constant_column_becomes_zero(tmp_path: Path) -> None:
    table = houses() | {"size": [0.1] * 240}  # the standard deviation of 0.1, in floating point, is not 0
    data = table_regression(source(write_csv(tmp_path / "h.csv", table)), ["price"], numeric=["size", "age"])
    for split in (data.train, data.val, data.test):
        assert not split.tensors[0][:, 0].any()  # type: ignore[attr-defined]
        assert split.tensors[0][:, 1].any()  # type: ignore[attr-defined]


def test_numbers_that_name_classes_and_categories_are_the_same_in_every_file_type(tmp_path: Path) -> None:
    grades = [1 + index % 3 for index in range(240)]
    columns = {**houses(), "label": grades, "town": [index % 2 for index in range(240)]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    decimals = [{**row, "label": float(row["label"]), "town": float(row["town"])} for row in rows]  # type: ignore[arg-type]
    (tmp_path / "integers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "decimals.jsonl").write_text("\n".join(map(json.dumps, decimals)))
    write_csv(tmp_path / "integers.csv", columns)
    write_csv(tmp_path / "decimals.csv", {key: [row[key] for row in decimals] for key in columns})
    for name in ("integers.jsonl", "decimals.jsonl", "integers.csv", "decimals.csv"):
        data = table_classification(
            source(tmp_path / name), ["1", "2", "3"], numeric=["size"], categorical={"town": ["0", "1"]}
        )
        splits = [split.tensors for split in (data.train, data.val, data.test)]  # type: ignore[attr-defined]
        inputs, labels = (torch.cat(part) for part in zip(*splits, strict=True))
        assert labels.bincount().tolist() == [80, 80, 80]
        assert torch.equal(inputs[:, 1:].sum(1), torch.ones(240))
    (tmp_path / "zero.jsonl").write_text("\n".join(json.dumps(row | {"label": 0}) for row in rows))
    with pytest.raises(QatkitError, match=r"label 0 is not one of \['1', '2', '3'\], some of which are numbers"):
        table_classification(source(tmp_path / "zero.jsonl"), ["1", "2", "3"], numeric=["size"]).prepare_data()


def test_an_integer_of_any_length_is_a_bad_record(tmp_path: Path) -> None:
    huge = "1" + "0" * 400
    lines = [f'{{"size": {huge}, "label": {huge}, "number": {index}}}' for index in range(20)]
    (tmp_path / "h.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        QatkitError, match=r"h\.jsonl:\d+: column 'label' contains an integer beyond the range of float32"
    ):
        table_regression(source(tmp_path / "h.jsonl"), ["label"], numeric=["size"]).prepare_data()
    with pytest.raises(QatkitError, match=r"h\.jsonl:\d+: label 10+\.\.\. is neither one of .* nor a class index"):
        table_classification(source(tmp_path / "h.jsonl"), ["a", "b"], numeric=["number"]).prepare_data()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "numeric: no input column is listed"),
        ({"numeric": ["size", "price"]}, "numeric: column 'price' is listed more than once"),
        ({"categorical": {"town": ["north"]}}, r"categorical\.town: \['north'\] is not a list of two or more"),
        ({"numeric": ["height"]}, r".*h\.csv:2: has no column 'height'; its columns are \['age', "),
    ],
)
def test_columns_that_cannot_be_inputs_are_refused(arguments: Any, message: str, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "h.csv", houses(20))
    with pytest.raises(QatkitError, match=f"^{message}"):
        table_regression(source(path), ["price"], **arguments).prepare_data()


def test_a_training_set_smaller_than_a_batch_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    data = table_regression(source(write_csv(tmp_path / "h.csv", houses(20))), ["price"], **INPUTS, batch_size=64)
    with pytest.raises(QatkitError, match=r"^batch_size: 64 exceeds the \d+ training samples of each process"):
        data.train_dataloader()
    (tmp_path / "empty.csv").touch()
    with pytest.raises(QatkitError, match="there is no valid record"):
        table_regression(source(tmp_path / "empty.csv"), ["price"], **INPUTS).prepare_data()
