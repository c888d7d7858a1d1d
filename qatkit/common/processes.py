"""Processes on this machine."""

from __future__ import annotations

import os
import sys


def process_exists(pid: int) -> bool:
    """Whether a process with this ID exists; on Windows, True is assumed.

    Example:
        >>> process_exists(os.getpid())
        True
    """
    if sys.platform == "win32":  # where kill(pid, 0) ends the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
