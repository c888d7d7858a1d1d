"""Class names, and the lookup of a record's class by name or index."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

from qatkit.data.source import BadRecord, missing
from qatkit.errors import QatkitError


def check_classes(classes: Sequence[str]) -> None:
    """Raise an error unless there are at least two class names, all distinct.

    Raises:
        QatkitError: there are fewer than two, or a name occurs twice.
    """
    if len(set(classes)) < max(2, len(classes)):
        raise QatkitError(
            f"{list(classes)} is not a list of two or more different names",
            key="classes",
            advice="list each class once, in the order of the model's outputs",
        )


def class_of(record: Mapping[str, Any], column: str, classes: Sequence[str]) -> int | BadRecord:
    """Return the class index of a record, or the reason why it has none.

    If class names are numbers, a number is interpreted as a name and never as an index.

    Example:
        >>> class_of({"label": "dog"}, "label", ["cat", "dog"]), class_of({"label": 0}, "label", ["cat", "dog"])
        (1, 0)
    """
    if column not in record:
        return missing(record, column)
    value = record[column]
    position = position_of(value, classes)
    if position is not None:
        return position
    number = _number(value)
    if _named_numbers(tuple(classes)):
        return BadRecord(f"{column} {_shown(value)} is not one of {list(classes)}, some of which are numbers")
    if number is not None and number.is_integer() and 0 <= number < len(classes):
        return int(number)
    return BadRecord(f"{column} {_shown(value)} is neither one of {list(classes)} nor a class index")


def position_of(value: Any, names: Sequence[str]) -> int | None:
    """Return the position of a value among names; different notations of the same number are equal.

    A CSV file may contain "1" or "1.0" where JSON Lines and Parquet contain 1 or 1.0.

    Example:
        >>> position_of("b", ["a", "b"]), position_of(1.0, ["0", "1"]), position_of("1", ["0.0", "1.0"])
        (1, 1, 1)
    """
    if isinstance(value, str) and value in names:
        return list(names).index(value)
    number = _number(value)
    return None if number is None else _named_numbers(tuple(names)).get(number)


@lru_cache(maxsize=64)
def _named_numbers(names: tuple[str, ...]) -> dict[float, int]:
    """The positions of the names that are numbers."""
    found: dict[float, int] = {}
    for index, name in enumerate(names):
        if (number := _number(name)) is not None:
            found.setdefault(number, index)
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        return None
    if isinstance(value, str) and "_" in value:  # Python reads 1_0 as ten
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(value: Any) -> str:
    shown = json.dumps(value, default=str)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."
