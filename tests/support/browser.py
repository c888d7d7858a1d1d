"""A real browser for the tests of pages, or the reason why those tests are skipped."""

from __future__ import annotations

import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """The path of Chromium; without one the test is skipped, or fails where ``QATKIT_REQUIRE_BROWSER=1`` is set."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    reason = f"needs a browser, and none of {', '.join(NAMES)} is on PATH; run `apt-get install -y chromium`"
    if os.environ.get("QATKIT_REQUIRE_BROWSER") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
