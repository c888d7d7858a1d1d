"""Select the process of a distributed run that writes files."""

from __future__ import annotations

import os
import threading
import time


def is_first_process() -> bool:
    """Whether this process writes files; decided by the launchers' environment variables."""
    return all(int(os.environ.get(name, 0)) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def end_with_parent(seconds: float = 1.0) -> None:
    """End this process soon after the one that launched it has ended, however that ended.

    A launched process whose launcher was killed would otherwise wait for the others until a timeout of half an hour.

    Args:
        seconds: Time between two looks.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def leave_processes() -> None:
    """End the process group, so that the first process continues alone and its data is no longer split by rank."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
