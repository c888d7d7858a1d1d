"""Measure how much of a run its digests and its lock take.

Run: python benchmarks/digest_cost.py
Takes about three minutes.

Runs the recipe of ``make demo`` and adds up the wall time inside the functions that compute digests of files and of
records, and that take and release the lock of the run folder.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from harness import Claim, finish

from qatkit.cli.main import main as qatkit
from qatkit.common import records
from qatkit.run import lock

RECIPE = "vision/digits_resnet"


class Timed:
    """Adds up the time inside functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Replace a function of a module by one that is timed."""
        inner: Callable[..., Any] = getattr(owner, attribute)
        self.seconds.setdefault(name, 0.0)
        self.calls.setdefault(name, 0)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - began
                self.calls[name] += 1

        setattr(owner, attribute, timed)


def main() -> None:
    timed = Timed()
    timed.wrap(hashlib, "file_digest", "digests of files")
    timed.wrap(records, "content_digest", "digests of records")
    timed.wrap(lock, "_acquire", "lock")
    timed.wrap(lock, "_release", "lock")
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        try:
            with patch.object(sys, "argv", ["qatkit", "run", RECIPE, "--out", f"{folder}/run", "--quiet"]):
                qatkit()
        except SystemExit as ended:
            if ended.code:
                raise
        whole = time.perf_counter() - began
    rows = [
        {"part": name, "calls": timed.calls[name], "seconds": round(seconds, 4), "of the run": f"{seconds / whole:.3%}"}
        for name, seconds in timed.seconds.items()
    ]
    rows.append({"part": RECIPE, "calls": 1, "seconds": round(whole, 1), "of the run": "100%"})
    cost = sum(timed.seconds.values()) / whole
    assert all(timed.calls.values()), "a function is called elsewhere"
    finish(
        "digest_cost",
        rows,
        [Claim("fraction of a run's wall time spent on digests and the lock", "<= 1%", f"{cost:.3%}", cost <= 0.01)],
    )


if __name__ == "__main__":
    main()
