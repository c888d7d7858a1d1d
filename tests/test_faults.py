"""The quick mode of `benchmarks/faults.py`: a few kills, damaged files and mutated recipes, which are all survived."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import warm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def test_a_few_faults_of_each_kind_are_survived() -> None:
    command = [warm.python(), str(ROOT / "benchmarks" / "faults.py"), "--quick", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.count(" | ") == 4]
    assert done.returncode == 0, done.stdout + done.stderr
    assert {kind.partition(",")[0] for kind, *_ in rows} >= {
        "SIGKILL between the last step and the record", "damaged file", "mutated recipe", "valid mutated recipe"
    }  # fmt: skip
    assert all(tried == survived and int(tried) > 0 for *_, tried, survived in rows)
