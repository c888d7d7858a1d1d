"""The content of a LiteRT file as plain data, and its bytes in LiteRT's schema (version 3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qatkit.export.litert.flatbuffer import Reader, Table, to_bytes

IDENTIFIER = b"TFL3"
OUTPUTS = "qatkit.outputs"
"""The metadata with the names of the model's outputs, separated by line breaks; see `Content.outputs`."""
_TYPES = {"float32": 0, "int32": 2, "int64": 4, "bool": 6, "int8": 9}
_DTYPES = {number: name for name, number in _TYPES.items()}
_SIGNATURE = "serving_default"


@dataclass(frozen=True)
class Grid:
    """The quantization of a tensor: a value is ``scale * (code - zero_point)``."""

    scales: np.ndarray[Any, Any]
    """float32, one for the tensor or one for each index of `axis`."""
    zero_points: np.ndarray[Any, Any]
    """int64, as many as scales."""
    axis: int = 0


@dataclass(frozen=True)
class Tensor:
    """A constant or an activation."""

    name: str
    shape: tuple[int, ...]
    """Sizes; -1 is a size that may vary."""
    dtype: str
    grid: Grid | None = None
    values: np.ndarray[Any, Any] | None = None
    """The values of a constant."""


@dataclass(frozen=True)
class Operator:
    """One operation."""

    code: int
    """The number of the operator in LiteRT's ``BuiltinOperator``."""
    version: int
    inputs: tuple[int, ...]
    """Indices of tensors; -1 omits an optional input."""
    outputs: tuple[int, ...]
    options: Table = field(default_factory=dict)
    options_type: int = 0
    """The number of the table of options in LiteRT's ``BuiltinOptions``."""


@dataclass
class Content:
    """A file with one graph."""

    tensors: list[Tensor] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    inputs: dict[str, int] = field(default_factory=dict)
    """Tensors by the name of the input."""
    outputs: dict[str, int] = field(default_factory=dict)
    """Tensors by the name of the output; the only output of a model that returns one tensor has the name ""."""


def encode(content: Content) -> bytes:
    """Return the bytes of a file."""
    codes = list(dict.fromkeys((each.code, each.version) for each in content.operators))
    buffers: list[Table] = [{}]  # the first one is empty by convention
    tensors = [_tensor(tensor, buffers) for tensor in content.tensors]
    buffers.append({0: "\n".join(content.outputs).encode()})
    names = list(content.outputs) if "" not in content.outputs else ["output"]
    graph = {
        0: tensors,
        1: np.array(list(content.inputs.values()), np.int32),
        2: np.array(list(content.outputs.values()), np.int32),
        3: [_operator(each, codes.index((each.code, each.version))) for each in content.operators],
    }
    signature = {
        0: [{0: name, 1: np.uint32(index)} for name, index in content.inputs.items()],
        1: [{0: name, 1: np.uint32(index)} for name, index in zip(names, content.outputs.values(), strict=True)],
        2: _SIGNATURE,
        4: np.uint32(0),
    }
    root: Table = {
        0: np.uint32(3),
        1: [{0: np.int8(min(code, 127)), 2: np.int32(version), 3: np.int32(code)} for code, version in codes],
        2: [graph],
        3: "qatkit",
        4: buffers,
        6: [{0: OUTPUTS, 1: np.uint32(len(buffers) - 1)}],
        7: [signature],
    }
    return to_bytes(root, IDENTIFIER)


def _tensor(tensor: Tensor, buffers: list[Table]) -> Table:
    made: dict[int, Any] = {
        0: np.array([1 if size < 0 else size for size in tensor.shape], np.int32),
        1: np.int8(_TYPES[tensor.dtype]),
        2: np.uint32(0),
        3: tensor.name,
        8: np.bool_(True),
    }
    if tensor.values is not None:
        made[2] = np.uint32(len(buffers))
        buffers.append({0: np.ascontiguousarray(tensor.values, tensor.dtype).tobytes()})
    if -1 in tensor.shape:
        made[7] = np.array(tensor.shape, np.int32)
    if (grid := tensor.grid) is not None:
        made[4] = {
            2: grid.scales.astype(np.float32), 3: grid.zero_points.astype(np.int64), 6: np.int32(grid.axis)
        }  # fmt: skip
    return made


def _operator(operator: Operator, index: int) -> Table:
    made: dict[int, Any] = {
        0: np.uint32(index), 1: np.array(operator.inputs, np.int32), 2: np.array(operator.outputs, np.int32)
    }  # fmt: skip
    if operator.options_type:
        made |= {3: np.uint8(operator.options_type), 4: operator.options}
    return made


def decode(data: bytes) -> Content:
    """Return the content of a file; the options of its operators are left out.

    Raises:
        ValueError: this is not a LiteRT file, or it is damaged.
    """
    if data[4:8] != IDENTIFIER:
        raise ValueError("not a LiteRT file")
    try:
        return _decoded(Reader(data))
    except (IndexError, KeyError, OverflowError, RecursionError, StopIteration) as error:
        raise ValueError(f"damaged: {error}") from error


def _decoded(root: Reader) -> Content:
    (graph,) = root.tables(2)
    (signature,) = root.tables(7)
    buffers = [buffer.array(0, "u1") for buffer in root.tables(4)]
    codes = [(code.scalar(3, "<i4"), code.scalar(2, "<i4", 1)) for code in root.tables(1)]
    names = next(buffers[each.scalar(1, "<u4")] for each in root.tables(6) if each.text(0) == OUTPUTS)
    outputs = zip(names.tobytes().decode().split("\n"), graph.array(2, "<i4").tolist(), strict=True)
    operators = [
        Operator(code, version, tuple(each.array(1, "<i4").tolist()), tuple(each.array(2, "<i4").tolist()))
        for each in graph.tables(3)
        for code, version in [codes[each.scalar(0, "<u4")]]
    ]
    inputs = {each.text(0): each.scalar(1, "<u4") for each in signature.tables(0)}
    return Content([_read_tensor(each, buffers) for each in graph.tables(0)], operators, inputs, dict(outputs))


def _read_tensor(tensor: Reader, buffers: list[np.ndarray[Any, Any]]) -> Tensor:
    shape, dtype = tensor.array(0, "<i4"), _DTYPES[tensor.scalar(1, "i1")]
    data = buffers[tensor.scalar(2, "<u4")]
    quantization = tensor.table(4)
    grid = None
    if quantization is not None and len(scales := quantization.array(2, "<f4")):
        grid = Grid(scales, quantization.array(3, "<i8"), quantization.scalar(6, "<i4"))
    signature = tensor.array(7, "<i4")
    values = np.frombuffer(data.tobytes(), dtype).reshape(shape) if len(data) else None
    return Tensor(tensor.text(3), tuple((signature if len(signature) else shape).tolist()), dtype, grid, values)
