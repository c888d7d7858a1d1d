"""Tests that need a browser are skipped with the reason where there is none, and fail where one is required."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.browser import chromium


@pytest.fixture(autouse=True)
def _no_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("QATKIT_REQUIRE_BROWSER", raising=False)


def test_without_a_browser_a_test_is_skipped_with_the_command_that_installs_one() -> None:
    with pytest.raises(pytest.skip.Exception, match="apt-get install -y chromium"):
        chromium()


def test_where_a_browser_is_required_its_absence_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QATKIT_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="needs a browser"):
        chromium()


def test_a_browser_on_the_path_is_used(tmp_path: Path) -> None:
    (tmp_path / "chromium").write_text("#!/bin/sh\n")
    (tmp_path / "chromium").chmod(0o755)
    assert chromium() == str(tmp_path / "chromium")
