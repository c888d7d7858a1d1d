"""Sparse export: safetensors files that omit pruned weights; a zero takes at most one bit on disk."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from qatkit.common.files import atomic_path
from qatkit.export.dense import dense_state, load_and_compare, metadata
from qatkit.export.interface import ExportContext, ReadBack
from qatkit.pruning.storage import load_sparse, save_sparse


def write(model: nn.Module, path: Path, context: ExportContext) -> None:
    """Write a sparse file; `context` is not used."""
    export_sparse(model, path)


def read_back(model: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """Load a sparse file into the plain model, and compare every tensor."""
    return load_and_compare(model, path, load_sparse)


def export_sparse(model: nn.Module, path: Path | str) -> None:
    """Export the same tensors as `export_dense`, each in its smallest format: dense, bitmask or CSR.

    `qatkit.pruning.storage.load_sparse` returns the dense state dict.

    Args:
        model: A plain model, or one prepared by `prepare_qat`.
        path: The safetensors file, which is written atomically.

    Raises:
        QatkitError: tied layers quantize their common weight differently, so no single value is correct for both.
    """
    with atomic_path(Path(path)) as temporary:
        save_sparse(dense_state(model), temporary)


def is_sparse(path: Path) -> bool:
    """Whether a safetensors file was written by `export_sparse`."""
    return "sparse" in metadata(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the dense state dict from a safetensors file, sparse or not."""
    return load_sparse(path) if is_sparse(path) else load_file(path)


def dense_bytes(path: Path) -> int:
    """Return the bytes that the tensors of a safetensors file take in dense storage, without the header."""
    return sum(value.numel() * value.element_size() for value in read_weights(path).values())
