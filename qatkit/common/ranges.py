"""The ranges of numeric fields, declared once in the annotation and checked when the dataclass is created."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from qatkit.errors import QatkitError

INT32 = 2**31 - 1
"""The largest count: torch and its kernels store many sizes in 32 bits."""
INT64 = 2**63 - 1
"""The largest integer in a tensor."""
FLOAT32 = 3.4028234663852886e38
"""The largest float32."""


@dataclass(frozen=True)
class Range:
    """The values that a number may have.

    Args:
        low: The smallest value.
        high: The largest value.
        above: Exclude `low` itself.
        below: Exclude `high` itself.
        example: A typical value, for the advice in errors.

    Example:
        >>> Range(1, 8).problem(9)
        'use an integer of at most 8'
        >>> Range(0.0, 1.0, below=True).problem(1.0)
        'use a non-negative number below 1'
        >>> Range(0.0, 100.0, above=True, example="1e-3").problem(0.0)
        'use a positive number, such as 1e-3'
        >>> Range(1, 8).problem(8)
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    example: str = ""

    def problem(self, value: float) -> str | None:
        """Advice for a value that is out of range; None if the value is in range."""
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        if low and high:
            return None
        example = f", such as {self.example}" if self.example else ""
        return f"{self._words(too_high=low and not math.isnan(value))}{example}"

    def _words(self, too_high: bool) -> str:
        low, high = _short(self.low), _short(self.high)
        sign = ("positive " if self.above else "non-negative ") if self.low == 0 else ""
        if isinstance(self.low, int):
            if too_high:
                return f"use an integer of at most {high}"
            words = {0: "a non-negative integer", 1: "a positive integer"}
            return f"use {words.get(self.low, f'an integer of at least {low}')}"
        if self.high == 1:  # a fraction
            if self.above and self.below:
                return f"use a fraction between {low} and {high}"
            if sign and (self.above or self.below):
                return f"use a {sign}number {'below' if self.below else 'of at most'} 1"
            return f"use a number from {low} to 1"
        if too_high:
            return f"use a number {'below' if self.below else 'of at most'} {high}"
        if sign:
            return f"use a {sign}number"
        return f"use a number {'above' if self.above else 'of at least'} {low}"


Count = Annotated[int, Range(1, INT32)]
"""A count of at least 1."""
Steps = Annotated[int, Range(0, INT32)]
"""A number of steps, which may be 0."""
Seed = Annotated[int, Range(0, INT64)]
"""A random seed."""
Fraction = Annotated[float, Range(0.0, 1.0)]
"""A fraction from 0 to 1, both included."""
ProperFraction = Annotated[float, Range(0.0, 1.0, above=True, below=True)]
"""A fraction between 0 and 1, both excluded."""


def check_ranges(config: Any) -> None:
    """Check the numeric fields of a dataclass against the ranges in their annotations.

    Values that are not numbers, such as None and strings, are not checked.

    Args:
        config: A dataclass with fields such as ``rank: Annotated[int, Range(1, 8)]``; ``| None`` may follow.

    Raises:
        QatkitError: a value is out of range; the key is the name of the field.

    Example:
        >>> @dataclass
        ... class Block:
        ...     rank: Annotated[int, Range(1, 8)] = 4
        >>> check_ranges(Block(rank=9))
        Traceback (most recent call last):
        ...
        qatkit.errors.QatkitError: rank: 9 is out of range; use an integer of at most 8
    """
    for name, allowed in ranges_of(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if (advice := allowed.problem(value)) is not None:
            raise QatkitError(f"{value} is out of range", key=name, advice=advice)


def ranges_of(cls: type[Any]) -> dict[str, Range]:
    """The ranges in the annotations of a class, by field name.

    Args:
        cls: A dataclass whose annotations can be evaluated in its module.
    """
    hints = get_type_hints(cls, include_extras=True)
    return {name: found for name, hint in hints.items() if (found := _range_in(hint)) is not None}


def _range_in(hint: Any) -> Range | None:
    """The range of an annotation, or of the member of a union."""
    if get_origin(hint) is Annotated:
        return next((extra for extra in hint.__metadata__ if isinstance(extra, Range)), None)
    if get_origin(hint) in (list, dict, tuple):  # their items are no fields
        return None
    return next((found for part in get_args(hint) if (found := _range_in(part)) is not None), None)


def _short(number: float) -> str:
    """Format an integer without decimals: 0 rather than 0.0."""
    return str(int(number)) if float(number).is_integer() and abs(number) < 1e16 else str(number)
