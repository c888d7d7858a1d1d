"""Wait for a file, however long a loaded machine takes; pytest's own timeout ends a test that hangs."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any


def wait_for(path: Path, process: subprocess.Popen[Any]) -> None:
    """Return once the file exists; fail if the process that should write it ends first."""
    while not path.exists():
        ended = process.poll() is not None
        assert path.exists() or not ended, f"the process ended with {process.returncode} and did not write {path}"
        time.sleep(0.002)
