"""torch.onnx makes its table of 700 operators anew for every export, which is most of the time that a small one takes.

The table is the same each time: tests make it once in a process. What an export adds goes to a registry of its own.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch.onnx._internal.exporter._registration import onnxscript_apis

APIS: Any = onnxscript_apis  # a module that is imported when it is first used


@functools.cache
def operators() -> Any:
    return importlib.import_module(APIS._name).get_torchlib_ops()


APIS.get_torchlib_ops = operators
