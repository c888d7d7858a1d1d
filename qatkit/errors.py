"""The error that qatkit raises for user mistakes, its warning category, and the suggestions in messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_LONG_WORD = re.compile(r"\S{500,}")
"""Matches a name or value without spaces that would fill the terminal; paths of run folders are shorter."""


class QatkitError(ValueError):
    """A user mistake, stored as separate fields and rendered as ``key: problem; advice (origin)``.

    Args:
        problem: The problem, with the value seen.
        key: The location: a recipe key, an argument or a file. Empty if the problem itself states the location.
        advice: How to fix the problem.
        origin: The file or override with the value.

    Example:
        >>> print(QatkitError("48 does not divide in_features=64", key="group_size", advice="use 16, 32 or 64"))
        group_size: 48 does not divide in_features=64; use 16, 32 or 64
    """

    def __init__(self, problem: str, *, key: str = "", advice: str = "", origin: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.key = key
        self.advice = advice
        self.origin = origin

    def __str__(self) -> str:
        text = f"{self.key}: {self.problem}" if self.key else self.problem
        text += f"; {self.advice}" if self.advice else ""
        text = f"{text} ({self.origin})" if self.origin else text
        return _LONG_WORD.sub(lambda word: f"{word[0][:57]}...", text)

    def under(self, prefix: str) -> QatkitError:
        """Return the same error with `prefix` added before its key.

        Example:
            >>> QatkitError("48 is odd", key="group_size").under("stages.qat.quantize").key
            'stages.qat.quantize.group_size'
        """
        return self.with_fields(key=join_key(prefix, self.key))

    def with_fields(
        self,
        *,
        problem: str | None = None,
        key: str | None = None,
        advice: str | None = None,
        origin: str | None = None,
    ) -> QatkitError:
        """Return the same error with some fields replaced."""
        error = type(self)(
            self.problem if problem is None else problem,
            key=self.key if key is None else key,
            advice=self.advice if advice is None else advice,
            origin=self.origin if origin is None else origin,
        )
        error.__cause__ = self.__cause__
        return error


class QatkitWarning(UserWarning):
    """The warning that a requested setting has no effect, or is slower or less accurate than expected."""


def join_key(prefix: str, key: str) -> str:
    """Join `prefix` and `key` to a dotted key; either may be empty.

    Example:
        >>> join_key("stages.qat", "lr"), join_key("include", "[0]"), join_key("", "lr")
        ('stages.qat.lr', 'include[0]', 'lr')
    """
    if not prefix or not key or key.startswith("["):
        return f"{prefix}{key}"
    return f"{prefix}.{key}"


@contextmanager
def under(prefix: str) -> Iterator[None]:
    """Add `prefix` before the key of every `QatkitError` raised inside the block."""
    try:
        yield
    except QatkitError as error:
        raise error.under(prefix) from error.__cause__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return advice about an unknown name: the nearest known name, or a few known names.

    Example:
        >>> did_you_mean("mgnitude", ["magnitude", "wanda"])
        "did you mean 'magnitude'?"
        >>> did_you_mean("xyz", ["magnitude", "wanda"])
        'use one of magnitude, wanda'
    """
    names = [str(candidate) for candidate in known]
    by_lower = {candidate.lower(): candidate for candidate in reversed(names)}
    if near := difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5):
        return f"did you mean '{by_lower[near[0]]}'?"
    if not names:
        return "no names are available"
    return f"use one of {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
