"""The integer layers of a ``.pte`` file as plain data, read from the XNNPACK graphs that it contains.

The program is read with ExecuTorch's own deserializer, and XNNPACK's graphs (``schema.fbs`` in
``executorch/backends/xnnpack/serialization``) from their bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qatkit.export.litert.flatbuffer import Reader

METADATA = "qatkit"
"""The method of the file that returns its metadata as JSON."""
_HEADER, _IDENTIFIER = b"XH00", b"XN01"
_FULLY_CONNECTED, _CONVOLUTION, _DEPTHWISE = 2, 7, 13
"""Numbers of nodes in ``XNodeUnion``."""
_FLOAT32, _QINT8, _QCINT8, _QCINT32, _QCINT4, _QDINT8, _QBINT4 = 1, 3, 6, 7, 8, 9, 10
"""Numbers of data types in ``XNNDatatype``."""
_NAMES = {
    _FLOAT32: "float32", _QINT8: "int8", _QCINT8: "int8", _QCINT32: "int32", _QCINT4: "int4", _QDINT8: "int8",
    _QBINT4: "int4",
}  # fmt: skip
_PER_CHANNEL, _PER_TENSOR, _PER_TOKEN, _PER_GROUP = 1, 2, 3, 4
"""Numbers of tables in ``XNNQuantParams``."""


@dataclass(frozen=True)
class Value:
    """A constant or an activation."""

    dtype: str
    """float32, int8, int32, int4, or "unknown"."""
    shape: tuple[int, ...]
    data: bytes
    """The bytes of a constant; empty for an activation."""
    scales: np.ndarray[Any, Any] | None = None
    """float32; None for floating-point values and dynamic activations."""
    zero_point: int = 0
    group_size: int = 0
    dynamic: bool = False
    """Whether the scale is computed per token."""

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """The values of a constant; codes of 4 bits become int8.

        Raises:
            ValueError: the shape and the bytes do not match.
        """
        if self.dtype != "int4":
            return np.frombuffer(self.data, self.dtype).reshape(self.shape)
        rows, columns = self.shape
        packed = np.frombuffer(self.data, np.uint8).reshape(rows, -1)
        pairs = np.stack([packed & 15, packed >> 4], 2).reshape(rows, -1)[:, :columns]
        return pairs.astype(np.int8) - 8


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution that XNNPACK computes."""

    name: str
    """The layer's name in the model."""
    depthwise: bool
    """Whether a convolution's weight is ``[1, height, width, out]`` instead of ``[out, height, width, in]``."""
    input: Value
    weight: Value
    bias: Value | None
    output: Value


@dataclass
class Content:
    """What a file contains."""

    inputs: list[str] = field(default_factory=list)
    """The names of the inputs, in order."""
    outputs: list[str] = field(default_factory=list)
    """The names of the outputs, in order; the only output of a model that returns one tensor has the name ""."""
    layers: list[Layer] = field(default_factory=list)
    grids: list[tuple[np.float32, int]] = field(default_factory=list)
    """Scale and zero point of every activation with a calibrated scale."""


def decode(data: bytes) -> Content:
    """Return the content of a file.

    Raises:
        ValueError: this is not an ExecuTorch program, or it is damaged, or not written by `export_executorch`.
    """
    from executorch.exir._serialize._program import deserialize_pte_binary

    if data[4:6] != b"ET":
        raise ValueError("not an ExecuTorch program")
    try:
        file = deserialize_pte_binary(data)
        program = file.program
        stored = file.named_data
        constants = {}
        if stored is not None:
            constants = {name: bytes(stored.buffers[each.buffer_index]) for name, each in stored.pte_data.items()}
        metadata = next(plan for plan in program.execution_plan if plan.name == METADATA)
        described = json.loads(metadata.values[metadata.outputs[0]].val.string_val)
        content = Content(described["inputs"], described["outputs"])
        names = {int(handle): name for handle, name in described["layers"].items()}
        for blob in program.backend_delegate_data:
            _Graph(bytes(blob.data), constants).add_to(content, names)
    except Exception as error:  # the deserializer runs another program, and raises what its output leads to
        raise ValueError(f"damaged: {type(error).__name__}: {error}") from error
    return content


class _Graph:
    """One graph that XNNPACK runs."""

    def __init__(self, data: bytes, constants: Mapping[str, bytes]) -> None:
        if data[4:8] != _HEADER:
            raise ValueError("not an XNNPACK graph")
        start, size = struct.unpack_from("<II", data, 10)
        graph = data[start : start + size]
        if graph[4:8] != _IDENTIFIER:
            raise ValueError("an XNNPACK graph with an unknown schema")
        self._root = Reader(graph)
        self._constants = [constants.get(each.text(2), b"") for each in self._root.tables(8)]
        self._values = dict(map(self._value, self._root.tables(2)))

    def add_to(self, content: Content, names: Mapping[int, str]) -> None:
        """Add the graph's layers and grids to the content of a file."""
        for value in self._values.values():
            if value.scales is not None and not value.data:
                content.grids.append((value.scales[0], value.zero_point))
        for node in self._root.tables(1):
            kind, name = node.scalar(0, "u1"), names.get(node.scalar(2, "<u4"))
            if kind in (_FULLY_CONNECTED, _CONVOLUTION, _DEPTHWISE) and name is not None:
                content.layers.append(self._layer(name, kind, node.table(1)))

    def _layer(self, name: str, kind: int, table: Reader | None) -> Layer:
        assert table is not None
        first = 0 if kind == _FULLY_CONNECTED else 15
        read, weight, bias, written = (table.scalar(first + slot, "<u4") for slot in range(4))
        values = self._values
        return Layer(name, kind == _DEPTHWISE, values[read], values[weight], values.get(bias), values[written])

    def _value(self, table: Reader) -> tuple[int, Value]:
        kind, value = table.scalar(0, "u1"), table.table(1)
        assert value is not None
        tensor, quantization, of = value, None, 0
        if kind == 2:
            found = value.table(0)
            assert found is not None
            tensor, of, quantization = found, value.scalar(1, "u1"), value.table(2)
        shape = tuple(tensor.array(2, "<u4").tolist())
        made: dict[str, Any] = {
            "dtype": _NAMES.get(tensor.scalar(0, "<i2"), "unknown"),
            "shape": shape,
            "data": self._constants[tensor.scalar(3, "<u4")],
        }
        if quantization is not None:
            made |= self._quantization(of, quantization)
        read = Value(**made)
        if read.data:
            _ = read.array  # raises an error if the shape and the bytes do not match
        return tensor.scalar(6, "<u4"), read

    def _quantization(self, of: int, table: Reader) -> dict[str, Any]:
        if of == _PER_TENSOR:
            scale = np.array([table.scalar(0, "<f4", 0.0)], np.float32)
            return {"scales": scale, "zero_point": table.scalar(1, "<i4")}
        if of == _PER_CHANNEL:
            return {"scales": np.frombuffer(self._constants[table.scalar(2, "<u4")], np.float32)}
        if of == _PER_GROUP:
            bits = np.frombuffer(self._constants[table.scalar(4, "<u4")], np.uint16).astype(np.uint32)
            return {"scales": (bits << 16).view(np.float32), "group_size": table.scalar(2, "<i4")}
        return {"dynamic": of == _PER_TOKEN}
