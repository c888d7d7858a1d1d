"""Cache torch.onnx's registry of 700 operators, which it otherwise rebuilds for every export.

The registry and its signatures never change, and building them takes most of the time of a small export. An export adds
its own operators to a separate registry.
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
    """Build the caches now, before processes are forked."""
    ONNXRegistry.from_torchlib()


APIS.get_torchlib_ops = operators
_schemas.op_signature_from_function = functools.cache(_schemas.op_signature_from_function)
