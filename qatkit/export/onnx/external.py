"""Write an ONNX model atomically, with its tensors in a side file if it is too large for one protobuf message.

The side file's name contains a digest of its content: ``model.1f2e3d4c.onnx.data``. The model, which is replaced last,
therefore never refers to the tensors of another export.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qatkit.common.files import atomic_path, naming, sha256_of, temporary_path
from qatkit.export.formats import FORMATS

LIMIT = 2**31 - 2**24
"""Maximum bytes of tensors in one file: a protobuf message is limited to 2 GiB, and the graph takes some of them."""
_SMALL = 1024
"""Tensors with fewer bytes stay in the file of the graph."""
_DIGEST = "qatkit.data_sha256"
"""Metadata key of the side file's digest."""


def save_model(model: Any, path: Path) -> None:
    """Write an onnx_ir model, and remove the side files of the export that it replaces."""
    import onnx
    from onnxscript import ir

    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    side = None
    if sum(value.const_value.nbytes for value in values) > LIMIT:
        side = _write_tensors(model, path)
        model.metadata_props[_DIGEST] = sha256_of(side)
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]  # runtimes infer shapes, and small files are smaller
    if side is not None:
        for entry in _locations(proto):
            entry.value = side.name
    with atomic_path(path) as temporary:
        onnx.save(proto, temporary)
    for old in FORMATS["onnx"].files_beside(path):
        if side is None or old.name != side.name:
            old.unlink()


def side_failures(path: Path) -> list[str]:
    """Describe how a file's side file differs from the exported one; empty if the file has none."""
    import onnx

    proto = onnx.load(path, load_external_data=False)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    failures = []
    for name in sorted({entry.value for entry in _locations(proto)}):
        side = path.parent / name
        if not side.is_file():
            failures.append(f"{name}: the file with the tensors of {path.name} is missing")
        elif sha256_of(side) != metadata.get(_DIGEST):
            failures.append(f"{name}: the content has changed since the export")
    return failures


def _write_tensors(model: Any, path: Path) -> Path:
    """Move the large tensors of a model to a side file, atomically, and return its path."""
    from onnxscript import ir

    temporary = temporary_path(path.with_name(f"{path.name}.data"))
    with naming(path):
        try:
            ir.external_data.unload_from_model(model, path.parent, temporary.name, size_threshold_bytes=_SMALL)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            side = path.with_name(f"{path.stem}.{sha256_of(temporary)[:8]}.onnx.data")
            os.replace(temporary, side)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return side


def _locations(proto: Any) -> Iterable[Any]:
    """The entries of external tensors that name their file."""
    return (entry for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location")
