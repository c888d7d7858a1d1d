"""Settings for every test: one thread, so that results do not depend on the load, and SIGINT as in a terminal."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys

import pytest
import torch

# module-scoped fixtures run before the function-scoped one below, and tests start processes of their own
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
if not torch.cuda.is_available():  # Triton chooses its interpreter when it is imported
    os.environ["TRITON_INTERPRET"] = "1"


# a job in the background, nohup and many CI runners ignore SIGINT and hand that on to every process below: tests that
# interrupt one would wait for ever
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _quiet_and_repeatable() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if "torch.onnx._internal.exporter._registration" in sys.modules:  # its import takes seconds: only where it is used
        importlib.import_module("tests.support.exporting")
