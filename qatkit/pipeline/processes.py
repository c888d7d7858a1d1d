"""Select the process of a distributed run that writes files."""

from __future__ import annotations

import os


def is_first_process() -> bool:
    """Whether this process writes files; decided by the launchers' environment variables."""
    return all(int(os.environ.get(name, 0)) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def leave_processes() -> None:
    """End the process group, so that the first process continues alone and its data is no longer split by rank."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
