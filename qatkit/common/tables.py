"""Tables of components: one small frozen table per kind, read by schema, validation, pipeline, report and docs.

A row is a frozen dataclass with a ``name``. It contains plain values and a reference to its implementation,
``module:function``, which is imported on first use, so reading a table is cheap.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

from qatkit.errors import QatkitError, did_you_mean


class Named(Protocol):
    """A row of a table."""

    @property
    def name(self) -> str:
        """The name that users write in recipes and arguments."""


Row = TypeVar("Row", bound=Named)


class Table(Mapping[str, Row], Generic[Row]):
    """A mapping from names to rows, in table order; an unknown name raises an error that suggests a known one.

    Args:
        kind: The kind of component, for errors: "export format".
        rows: The rows; names are unique.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Score:
        ...     name: str
        >>> SCORES = Table("score", [Score("magnitude"), Score("wanda")])
        >>> list(SCORES)
        ['magnitude', 'wanda']
        >>> SCORES.row("wnda", key="prune.method")
        Traceback (most recent call last):
        ...
        qatkit.errors.QatkitError: prune.method: unknown score 'wnda'; did you mean 'wanda'?
    """

    def __init__(self, kind: str, rows: Iterable[Row]) -> None:
        self.kind = kind
        self._rows: dict[str, Row] = {}
        for row in rows:
            assert row.name not in self._rows, f"{kind} '{row.name}' is in the table twice"
            self._rows[row.name] = row

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, name: str, key: str = "") -> Row:
        """Return the row with a user-supplied name.

        Args:
            name: The name.
            key: The recipe key or argument with the name, for the error.

        Raises:
            QatkitError: no row has this name.
        """
        if name not in self._rows:
            raise QatkitError(f"unknown {self.kind} '{name}'", key=key, advice=did_you_mean(name, self._rows))
        return self._rows[name]


def implementation(name: str) -> Any:
    """Import the ``module:attribute`` that a row refers to.

    Example:
        >>> implementation("qatkit.errors:join_key")("a", "b")
        'a.b'
    """
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
