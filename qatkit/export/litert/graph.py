"""Build the content of a LiteRT file from an ONNX graph: tensors, their layouts, and the decoding between them.

A value of the ONNX graph is stored as codes, as floating-point values, or both: it is decoded only if an operation
reads it in floating point. LiteRT's convolutions and pooling store channels last, so images are transposed where the
model reads or changes their layout.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from qatkit.errors import QatkitError
from qatkit.export.litert.content import Content, Grid, Operator, Tensor
from qatkit.export.onnx.constants import decoding_nodes

INSTEAD = "use export: {format: onnx}"
CODE_SHIFT = 128
"""What is subtracted from unsigned codes and their zero points, because LiteRT's codes are signed."""
_LAST, _FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
"""Orders of dimensions that move channels from the second to the last place, and back."""


@dataclass(frozen=True)
class Form:
    """Where a value is stored."""

    index: int
    """The tensor."""
    last: bool
    """Whether its channels are the last dimension instead of the second."""


class Kind(NamedTuple):
    """An operator of LiteRT: its number and version, and the number of the table of its options."""

    code: int
    version: int = 1
    options: int = 0


TRANSPOSE, DEQUANTIZE = Kind(39, 2), Kind(6, 2)


@dataclass(frozen=True)
class Weight:
    """A constant that the ONNX graph decodes."""

    name: str
    """The name of its parameter."""
    codes: np.ndarray[Any, Any]
    """int8 or int32, ``[out, in, ...]`` or ``[out]``."""
    scales: np.ndarray[Any, Any]
    """float32, one or one per output."""

    def grid(self, axis: int) -> Grid:
        """Return the quantization of the constant, whose outputs are the dimension `axis`."""
        scales = self.scales.reshape(-1)
        return Grid(scales, np.zeros(len(scales), np.int64), axis if len(scales) > 1 else 0)

    @property
    def values(self) -> np.ndarray[Any, Any]:
        """The decoded values."""
        scales = self.scales.reshape(-1, *[1] * (self.codes.ndim - 1)) if self.scales.ndim else self.scales
        values: np.ndarray[Any, Any] = self.codes.astype(np.float32) * scales
        return values


class Graph:
    """The content of the file while nodes are added to it.

    Args:
        proto: An ONNX model written by `qatkit.export.onnx.format.write_graph`, with inferred shapes.
    """

    def __init__(self, proto: Any) -> None:
        from onnx import numpy_helper

        self.content = Content()
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
        self.skipped: set[str] = set()
        """Values that an operation which has been added computes with others."""
        self.weights = self._decoded_constants(proto)
        self.outputs = [value.name for value in proto.graph.output]
        self._readers: dict[str, list[Any]] = {}
        for node in proto.graph.node:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        self._shapes = {
            value.name: tuple(each.dim_value if each.HasField("dim_value") else -1 for each in sizes.dim)
            for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info)
            if (sizes := value.type.tensor_type.shape) is not None and value.type.tensor_type.HasField("shape")
        }
        self._codes: dict[tuple[str, bool], int] = {}
        self._floats: dict[tuple[str, bool], int] = {}
        self._made: dict[tuple[Any, ...], int] = {}
        self._names: Counter[str] = Counter()

    def _decoded_constants(self, proto: Any) -> dict[str, Weight]:
        found = {}
        for (codes, scale, *zero_point), nodes in decoding_nodes(proto.graph, self.constants).items():
            if codes not in self.constants:
                continue
            self.skipped.update(output for node in nodes for output in node.output)
            values, scales = self.constants[codes], self.constants[scale]
            if any(self.constants[name].any() for name in zero_point) or scales.ndim > 1:
                raise QatkitError(
                    f"'{codes}': LiteRT export does not support weights with zero points or scales per group",
                    advice=INSTEAD,
                )
            values = values if values.dtype == np.int32 else values.astype(np.int8)
            found[nodes[-1].output[0]] = Weight(codes.removesuffix(".codes"), values, scales)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a value, with -1 for sizes that may vary."""
        if name in self.constants:
            return tuple(self.constants[name].shape)
        if name in self._shapes:
            return self._shapes[name]
        raise QatkitError(f"the number of dimensions of '{name}' is unknown", advice=INSTEAD)

    def reader(self, name: str) -> Any | None:
        """Return the only node that reads a value; None if there are several, or if it is an output of the model."""
        found = self._readers.get(name, [])
        return found[0] if len(found) == 1 and name not in self.outputs else None

    def add(self, tensor: Tensor) -> int:
        """Add a tensor and return its index; a name that is already taken gets a number."""
        self._names[tensor.name] += 1
        count = self._names[tensor.name]
        self.content.tensors.append(tensor if count == 1 else replace(tensor, name=f"{tensor.name}#{count}"))
        return len(self.content.tensors) - 1

    def emit(self, kind: Kind, inputs: list[int], output: int, options: dict[int, Any] | None = None) -> None:
        """Add an operation."""
        self.content.operators.append(
            Operator(kind.code, kind.version, tuple(inputs), (output,), options or {}, kind.options)
        )

    def constant(self, name: str, values: np.ndarray[Any, Any], grid: Grid | None = None) -> int:
        """Return the tensor of a constant, which is stored once per name and shape."""
        key = (name, values.shape, values.dtype.name)
        if key not in self._made:
            self._made[key] = self.add(Tensor(name, values.shape, values.dtype.name, grid, values))
        return self._made[key]

    def numbers(self, *values: Any) -> int:
        """Return the tensor of an int32 constant."""
        array = np.array(values, np.int32)
        key = ("numbers", array.shape, array.tobytes())
        if key not in self._made:
            self._made[key] = self.add(Tensor("numbers", array.shape, "int32", None, array))
        return self._made[key]

    def decoded(self, name: str, values: np.ndarray[Any, Any], grid: Grid) -> int:
        """Return a tensor of floating-point values that LiteRT decodes from the codes of a constant."""
        codes = self.constant(name, values, grid)
        if (codes, "decoded") not in self._made:
            out = self.add(Tensor(f"{name}:float", values.shape, "float32"))
            self.emit(DEQUANTIZE, [codes], out)
            self._made[codes, "decoded"] = out
        return self._made[codes, "decoded"]

    def has_codes(self, name: str) -> bool:
        """Whether a value is stored as codes."""
        return (name, True) in self._codes or (name, False) in self._codes

    def form(self, name: str) -> Form:
        """Return where a value is stored first: as codes, if it has any."""
        for stored in (self._codes, self._floats):
            for last in (True, False):
                if (name, last) in stored:
                    return Form(stored[name, last], last)
        raise QatkitError(f"'{name}' is not a value of the graph that LiteRT export supports", advice=INSTEAD)

    def grid(self, name: str) -> Grid:
        """Return the quantization of a value that is stored as codes."""
        grid = self.content.tensors[self.form(name).index].grid
        assert grid is not None
        return grid

    def codes(self, name: str, last: bool) -> int:
        """Return the codes of a value in a layout."""
        return self._in_layout(self._codes, name, last)

    def float(self, name: str, last: bool) -> int:
        """Return the floating-point values of a value in a layout: decoded from its codes if needed."""
        if name in self.weights and not last:
            weight = self.weights[name]
            return self.decoded(weight.name, weight.codes, weight.grid(0))
        if name in self.constants:
            values = self.constants[name]
            return self.constant(name, _moved(values, len(self.shape(name))) if last else values)
        if (name, False) not in self._floats and (name, True) not in self._floats:
            codes = self.form(name)
            tensor = self.content.tensors[codes.index]
            out = self.add(Tensor(f"{name}:float", tensor.shape, "float32"))
            self.emit(DEQUANTIZE, [codes.index], out)
            self._floats[name, codes.last] = out
        return self._in_layout(self._floats, name, last)

    def _in_layout(self, stored: dict[tuple[str, bool], int], name: str, last: bool) -> int:
        if (name, last) not in stored:
            source = stored[name, not last]
            tensor = self.content.tensors[source]
            order = _LAST if last else _FIRST
            shape = tuple(tensor.shape[axis] for axis in order)
            out = self.add(replace(tensor, name=tensor.name.partition("#")[0], shape=shape))
            self.emit(TRANSPOSE, [source, self.numbers(*order)], out)
            stored[name, last] = out
        return stored[name, last]

    def new_codes(self, name: str, quantizer: str, grid: Grid, last: bool) -> int:
        """Add the codes of a value, named after their quantizer."""
        self._codes[name, last] = self.add(Tensor(quantizer, self._stored_shape(name, last), "int8", grid))
        return self._codes[name, last]

    def new_float(self, name: str, last: bool) -> int:
        """Add the floating-point values of a value."""
        self._floats[name, last] = self.add(Tensor(f"{name}:float", self._stored_shape(name, last), "float32"))
        return self._floats[name, last]

    def same(self, name: str, source: str) -> None:
        """Let a value be stored where another one is, because they are equal."""
        for stored in (self._codes, self._floats):
            for last in (True, False):
                if (source, last) in stored:
                    stored[name, last] = stored[source, last]

    def quantizer(self, name: str) -> str:
        """Return the name of the quantizer of a value that is stored as codes."""
        return self.content.tensors[self.form(name).index].name.partition("#")[0]

    def _stored_shape(self, name: str, last: bool) -> tuple[int, ...]:
        shape = self.shape(name)
        return tuple(shape[axis] for axis in _LAST) if last else shape


def _moved(values: np.ndarray[Any, Any], rank: int) -> np.ndarray[Any, Any]:
    """Move the channels of a constant, which is broadcast to images, to the last place."""
    full = values.reshape(*[1] * (4 - rank), *values.shape)
    return full.transpose(_LAST) if rank else values
