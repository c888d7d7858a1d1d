"""Processes of a distributed run: rank 0, which writes files, and the processes that it launches."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from qatkit.common.processes import process_exists


def is_first_process() -> bool:
    """Whether this process is rank 0, which writes files, according to the environment variables of launchers."""
    return all(int(os.environ.get(name, 0)) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


LAUNCHER = "QATKIT_LAUNCHER"
"""Environment variable with the ID of the process that launches the others."""


def has_launcher() -> bool:
    """Whether another process of qatkit has started this one."""
    return LAUNCHER in os.environ


@contextmanager
def as_launcher() -> Iterator[None]:
    """Pass the ID of this process to the processes that it launches inside the block."""
    before = os.environ.get(LAUNCHER)
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        if before is None:
            del os.environ[LAUNCHER]
        else:
            os.environ[LAUNCHER] = before


def end_with_parent(seconds: float = 1.0) -> None:
    """End this process soon after its launcher ends, for any reason.

    Otherwise, a process whose launcher was killed would wait for the other processes until a timeout of half an hour.

    Args:
        seconds: Time between checks.
    """
    parent = os.getppid()
    launcher = int(os.environ.get(LAUNCHER, parent))  # it may have ended before this process came here

    def watch() -> None:
        while os.getppid() == parent and process_exists(launcher):
            time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def leave_processes() -> None:
    """Destroy the process group, so that rank 0 continues alone and its data is no longer split by rank."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
