"""torch.onnx makes its table of 700 operators and their signatures anew for every export: most of a small one's time.

Both are the same each time: tests make them once in a process. What an export adds goes to a registry of its own.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch.onnx._internal.exporter import _schemas
from torch.onnx._internal.exporter._registration import ONNXRegistry, onnxscript_apis

APIS: Any = onnxscript_apis  # a module that is imported when it is first used


@functools.cache
def operators() -> Any:
    return importlib.import_module(APIS._name).get_torchlib_ops()


def ready() -> None:
    """Make what is kept before it is asked for, as for processes to be forked."""
    ONNXRegistry.from_torchlib()


APIS.get_torchlib_ops = operators
_schemas.op_signature_from_function = functools.cache(_schemas.op_signature_from_function)
