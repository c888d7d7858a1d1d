"""Write and read tables of a FlatBuffers file without generated code.

A table is a mapping from slots, the numbers of its fields in the schema, to values. The type of a value is that of its
field: NumPy scalars, arrays (vectors of scalars), str, bytes (data of a buffer, aligned to 16 bytes), other tables, and
lists of tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Table = Mapping[int, Any]
_SCALARS = {"b": "Int8", "B": "Uint8", "?": "Bool", "i": "Int32", "I": "Uint32", "f": "Float32"}
"""Names of the methods of `flatbuffers.Builder`, by NumPy's characters of dtypes."""


def to_bytes(root: Table, identifier: bytes) -> bytes:
    """Return the bytes of a file with a root table.

    Args:
        root: The table.
        identifier: The four bytes that identify the kind of file.
    """
    from flatbuffers import Builder

    builder = Builder(1024)
    builder.ForceDefaults(True)
    builder.Finish(_table(builder, root), file_identifier=identifier)
    return bytes(builder.Output())


def _table(builder: Any, table: Table) -> int:
    offsets = {slot: _offset(builder, value) for slot, value in table.items() if not isinstance(value, np.generic)}
    builder.StartObject(max(table, default=-1) + 1)
    for slot, value in table.items():
        if slot in offsets:
            builder.PrependUOffsetTRelativeSlot(slot, offsets[slot], 0)
        else:
            getattr(builder, f"Prepend{_SCALARS[value.dtype.char]}Slot")(slot, value.item(), 0)
    return int(builder.EndObject())


def _offset(builder: Any, value: Any) -> int:
    """Write what a field refers to, and return where it is."""
    if isinstance(value, str):
        return int(builder.CreateString(value))
    if isinstance(value, bytes):
        builder.StartVector(1, len(value), 16)
        builder.head -= len(value)
        builder.Bytes[builder.head : builder.head + len(value)] = value
        return int(builder.EndVector())
    if isinstance(value, np.ndarray):
        return int(builder.CreateNumpyVector(value))
    if isinstance(value, Mapping):
        return _table(builder, value)
    tables = [_table(builder, each) for each in value]
    builder.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    return int(builder.EndVector())


class Reader:
    """A table of a file; missing fields have the default of the accessor.

    Args:
        data: The bytes of the file.
        position: Where the table starts; by default, the root table.
    """

    def __init__(self, data: bytes, position: int | None = None) -> None:
        self._data = data
        self._position = int(self._number(0, "<u4")) if position is None else position

    def _number(self, position: int, dtype: str) -> Any:
        if position < 0:
            raise ValueError("an offset points before the file")
        return np.frombuffer(self._data, dtype, 1, position)[0]

    def _field(self, slot: int) -> int | None:
        """Where a field is, or None if the table does not have it."""
        table = self._position - int(self._number(self._position, "<i4"))
        if 4 + 2 * slot >= int(self._number(table, "<u2")):
            return None
        offset = int(self._number(table + 4 + 2 * slot, "<u2"))
        return self._position + offset if offset else None

    def _target(self, slot: int) -> int | None:
        field = self._field(slot)
        return None if field is None else field + int(self._number(field, "<u4"))

    def scalar(self, slot: int, dtype: str, default: Any = 0) -> Any:
        """Return a scalar."""
        field = self._field(slot)
        return default if field is None else self._number(field, dtype).item()

    def array(self, slot: int, dtype: str) -> np.ndarray[Any, Any]:
        """Return a vector of scalars; empty if it is missing."""
        target = self._target(slot)
        if target is None:
            return np.zeros(0, dtype)
        return np.frombuffer(self._data, dtype, int(self._number(target, "<u4")), target + 4)

    def text(self, slot: int) -> str:
        """Return a string."""
        return self.array(slot, "u1").tobytes().decode()

    def table(self, slot: int) -> Reader | None:
        """Return a table, or None if it is missing."""
        target = self._target(slot)
        return None if target is None else Reader(self._data, target)

    def tables(self, slot: int) -> list[Reader]:
        """Return a vector of tables; empty if it is missing."""
        target = self._target(slot)
        if target is None:
            return []
        starts = [target + 4 + 4 * index for index in range(int(self._number(target, "<u4")))]
        return [Reader(self._data, start + int(self._number(start, "<u4"))) for start in starts]
