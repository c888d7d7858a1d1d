"""Settings for every test: one thread, so that results do not depend on what else the machine does."""

from __future__ import annotations

import logging
import os

import pytest
import torch

# for fixtures of a module, which are made before the one below, and for the processes that tests start
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
if not torch.cuda.is_available():  # Triton's kernels are run by its interpreter, which it decides where it is imported
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _quiet_and_repeatable() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
