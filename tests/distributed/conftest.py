"""The two processes of these tests come from two servers."""

from __future__ import annotations

import pytest

from tests.support import warm


@pytest.fixture(scope="session", autouse=True)
def _peers() -> None:
    warm.with_peers()
