"""Read and change the constants of ONNX files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

Array = np.ndarray[Any, Any]


def constants(path: Path) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def change_constant(path: Path, name: str, change: Callable[[Array], None]) -> None:
    """Change one constant of a file in place."""
    proto = onnx.load(path)
    (tensor,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(proto, path)


def first_changed(values: Array) -> None:
    """Change the first value: the next code, or twice a scale."""
    values.flat[0] = values.flat[0] * 2 if values.dtype == np.float32 else values.flat[0] + 1
