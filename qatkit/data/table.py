"""Data modules for table rows, encoded as vectors of standardized numbers and one-hot categories."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from qatkit.data.classes import check_classes, class_of, position_of
from qatkit.data.records import once
from qatkit.data.source import BadRecord, Source, missing
from qatkit.data.tokens import Encoded, Rows, prepare, refuse_stream
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.data.record_datamodule import RecordDataModule

LARGEST = float(np.finfo(np.float32).max)
"""The largest number: models compute in float32, where a larger number would be infinite."""


def table_classification(
    source: Source,
    classes: Sequence[str],
    label: str = "label",
    numeric: Sequence[str] = (),
    categorical: dict[str, list[str]] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> RecordDataModule:
    """Load labeled rows of a table, such as a CSV or Parquet file, for classification.

    The input is a vector ``[features]``: the numeric columns in order, standardized with the mean and standard
    deviation of the training split, followed by one-hot encoded categories.

    Args:
        source: The rows.
        classes: Class names in the order of the model's outputs. A row contains a name or an index.
        label: The column with the class.
        numeric: Columns with numbers.
        categorical: Columns with categories, each with all of its values.
        batch_size: Rows per device per step.
        seed: Determines the training order.

    Raises:
        QatkitError: there are fewer than two classes or no inputs; a row lacks a column, or has a value that is empty,
            non-finite or unknown; or a split would be empty.
    """
    check_classes(classes)
    inputs = Inputs(numeric, categorical or {}, [label])

    def encode_one(record: Mapping[str, Any]) -> Encoded:
        number = class_of(record, label, classes)
        values = inputs.of(record)
        for bad in (number, values):
            if isinstance(bad, BadRecord):
                return bad
        return [{"values": np.asarray(values), "labels": number}]

    options = {"kind": "table_classification", "classes": list(classes), "label": label}
    return _module(source, inputs, options, encode_one, "classification", batch_size, seed, classes)


def table_regression(
    source: Source,
    targets: Sequence[str],
    numeric: Sequence[str] = (),
    categorical: dict[str, list[str]] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> RecordDataModule:
    """Load rows of a table, such as a CSV or Parquet file, with one or more numbers to predict.

    The inputs are the same as in `table_classification`. Targets ``[targets]`` are not standardized.

    Args:
        source: The rows.
        targets: Columns with the numbers to predict, in the order of the model's outputs.
        numeric: Columns with numbers.
        categorical: Columns with categories, each with all of its values.
        batch_size: Rows per device per step.
        seed: Determines the training order.

    Raises:
        QatkitError: there are no targets or no inputs; a row lacks a column, or has a value that is empty, non-finite
            or unknown; or a split would be empty.
    """
    if not targets:
        raise QatkitError("the list is empty", key="targets", advice="list at least one column")
    inputs = Inputs(numeric, categorical or {}, targets)

    def encode_one(record: Mapping[str, Any]) -> Encoded:
        wanted = [number_in(record, column) for column in targets]
        values = inputs.of(record)
        for bad in (*wanted, values):
            if isinstance(bad, BadRecord):
                return bad
        return [{"values": np.asarray([*values, *wanted])}]  # type: ignore[misc]  # no BadRecord is left

    options = {"kind": "table_regression", "targets": list(targets)}
    return _module(source, inputs, options, encode_one, "regression", batch_size, seed, None)


class Inputs:
    """The input columns of a table.

    Args:
        numeric: Columns with numbers.
        categorical: Maps categorical columns to their values.
        predicted: Columns that the model predicts.

    Raises:
        QatkitError: there are no columns, a column is used twice, or a categorical column has fewer than two values.

    Example:
        >>> Inputs(["size"], {"color": ["red", "blue"]}, ["price"]).of({"size": "2.5", "color": "blue"})
        [2.5, 0.0, 1.0]
    """

    def __init__(self, numeric: Sequence[str], categorical: Mapping[str, Sequence[str]], predicted: Sequence[str]):
        self.numeric = list(numeric)
        self.categorical = {column: list(values) for column, values in categorical.items()}
        columns = [*self.numeric, *self.categorical, *predicted]
        if len(columns) == len(predicted):
            raise QatkitError(
                "no input column is listed", key="numeric", advice="list columns under numeric or categorical"
            )
        for column in columns:
            if columns.count(column) > 1:
                raise QatkitError(
                    f"column '{column}' is listed more than once",
                    key="categorical" if column in self.categorical else "numeric",
                    advice="use each column once, as an input or as a target",
                )
        for column, values in self.categorical.items():
            if len(set(values)) < max(2, len(values)):
                raise QatkitError(
                    f"{values} is not a list of two or more different values",
                    key=f"categorical.{column}",
                    advice="list each value of the column once",
                )

    @property
    def size(self) -> int:
        """The length of a row's vector."""
        return len(self.numeric) + sum(map(len, self.categorical.values()))

    def of(self, record: Mapping[str, Any]) -> list[float] | BadRecord:
        """Return the vector of a row before standardization, or the reason why it has none."""
        vector: list[float] = []
        for column in self.numeric:
            number = number_in(record, column)
            if isinstance(number, BadRecord):
                return number
            vector.append(number)
        for column, known in self.categorical.items():
            value = value_in(record, column)
            if isinstance(value, BadRecord):
                return value
            position = position_of(str(value), known)
            if position is None:
                return BadRecord(f"column '{column}' contains {str(value)!r}, which is not one of {known}")
            vector += [float(position == index) for index in range(len(known))]
        return vector


def value_in(record: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column, or a `BadRecord` if the column is missing or empty."""
    if column not in record:
        return missing(record, column)
    value = record[column]
    return BadRecord(f"column '{column}' is empty") if value is None or value == "" else value


def number_in(record: Mapping[str, Any], column: str) -> float | BadRecord:
    """Return the number in a column, or the reason why it has none.

    Example:
        >>> number_in({"size": "1e3"}, "size")
        1000.0
        >>> number_in({"size": "big"}, "size").problem
        "column 'size' contains 'big', not a finite number"
    """
    value = value_in(record, column)
    if isinstance(value, BadRecord):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    except OverflowError:  # JSON integers may have any number of digits
        return BadRecord(f"column '{column}' contains an integer beyond the range of float32")
    if not math.isfinite(number):
        return BadRecord(f"column '{column}' contains {value!r}, not a finite number")
    return (
        number
        if abs(number) <= LARGEST
        else BadRecord(f"column '{column}' contains {value!r}, which float32 cannot represent")
    )


class TableRows(Dataset[tuple[Tensor, Tensor]]):
    """A dataset of pairs: inputs ``[features]``, float32, and a class or targets.

    Args:
        open_rows: Opens the split.
        statistics: Returns the mean and standard deviation of the numeric columns in the training split.
        size: Number of inputs; other stored numbers are targets.
    """

    def __init__(
        self, open_rows: Callable[[], Rows], statistics: Callable[[], tuple[NDArray[Any], NDArray[Any]]], size: int
    ) -> None:
        self.open_rows = open_rows
        self.statistics = statistics
        self.size = size

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return all inputs ``[rows, features]``, and all labels ``[rows]`` or targets ``[rows, targets]``."""
        rows = self.open_rows()
        values = np.array(stored_values(rows))
        mean, deviation = self.statistics()
        values[:, : len(mean)] = (values[:, : len(mean)] - mean) / deviation
        x, y = np.split(values, [self.size], axis=1)
        labels = rows.streams.get("labels")
        return (
            torch.from_numpy(x).float(),
            torch.from_numpy(y).float() if labels is None else torch.from_numpy(np.array(labels)),
        )

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tensors[0][index], self.tensors[1][index]


def stored_values(rows: Rows) -> NDArray[Any]:
    """Return the stored values of all rows in a split, float64 ``[rows, values]``."""
    return rows.streams["values"].reshape(len(rows), -1)


def _module(
    source: Source,
    inputs: Inputs,
    options: dict[str, Any],
    encode_one: Callable[[Mapping[str, Any]], Encoded],
    task: str,
    batch_size: int,
    seed: int,
    classes: Sequence[str] | None,
) -> RecordDataModule:
    from qatkit.data.record_datamodule import RecordDataModule

    refuse_stream(source)

    def folder() -> Path:
        columns = {"numeric": inputs.numeric, "categorical": inputs.categorical}
        return prepare(source, None, options | columns, lambda records: [encode_one(record) for record in records])

    def compute() -> tuple[NDArray[Any], NDArray[Any]]:
        assert isinstance(data.train, TableRows)
        numbers = stored_values(data.train.open_rows())[:, : len(inputs.numeric)]
        # a constant column becomes 0: of many 0.1, neither the mean is 0.1 nor the deviation 0 in floating point
        constant = numbers.min(axis=0) == numbers.max(axis=0)
        mean, deviation = numbers.mean(axis=0), numbers.std(axis=0)
        return np.where(constant, numbers[0], mean), np.where(constant | (deviation == 0), 1.0, deviation)

    statistics = once(compute)
    data = RecordDataModule(
        folder, lambda rows, split: TableRows(rows, statistics, inputs.size), batch_size, seed, task, classes
    )
    return data


# read by `qatkit.tasks.declared_task`
table_classification.task = "classification"  # type: ignore[attr-defined]
table_regression.task = "regression"  # type: ignore[attr-defined]
