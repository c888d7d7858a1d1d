"""Parametrize a test over a matrix: representatives run in `make test`, all cases in `make slow` and in CI."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import pytest


def representatives(cases: Sequence[Any], kept: Set[int]) -> list[Any]:
    """Return the cases with the mark `slow` on all whose positions are not in `kept`."""
    assert kept <= set(range(len(cases))), f"{kept} of {len(cases)} cases"
    return [case if index in kept else _slow(case) for index, case in enumerate(cases)]


def _slow(case: Any) -> Any:
    if hasattr(case, "marks"):  # a pytest.param
        return pytest.param(*case.values, marks=[*case.marks, pytest.mark.slow], id=case.id)
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
