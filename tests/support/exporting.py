"""Cache torch.onnx's registry of 700 operators, which it otherwise rebuilds for every export.

The registry and its signatures never change, and building them takes most of the time of a small export. An export adds
its own operators to a separate registry.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch.onnx._internal.exporter import _schemas
from torch.onnx._internal.exporter._registration import onnxscript_apis
from tqdm import tqdm

APIS: Any = onnxscript_apis  # a module that is imported when it is first used


@functools.cache
def operators() -> Any:
    return importlib.import_module(APIS._name).get_torchlib_ops()


def ready() -> None:
    """Fill the caches now, before processes are forked: these, and those that the first export of a process fills."""
    kept, tqdm.monitor_interval = tqdm.monitor_interval, 0  # its progress bar would start a thread, which is not forked
    torch.onnx.export(torch.nn.Linear(2, 2).eval(), (torch.zeros(1, 2),), dynamo=True, verbose=False)
    tqdm.monitor_interval = kept


APIS.get_torchlib_ops = operators
_schemas.op_signature_from_function = functools.cache(_schemas.op_signature_from_function)
