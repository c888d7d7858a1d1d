"""A checkpoint without its zeros: what pruning made zero takes a bit per weight on disk, or nothing."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from qatkit.export.dense import dense_state, replacing
from qatkit.pruning.storage import load_sparse, save_sparse


def export_sparse(model: nn.Module, path: Path | str) -> None:
    """Write the weights of `export_dense`, each in its smallest form: dense, with a bitmask, or CSR.

    `qatkit.pruning.storage.load_sparse` gives the dense state dict back.

    Args:
        model: A plain model, or one from `prepare_qat`.
        path: The safetensors file to write; appears whole or not at all.

    Raises:
        QatkitError: a weight is shared by layers that quantize it differently, so that no single value is right.
    """
    with replacing(Path(path)) as temporary:
        save_sparse(dense_state(model), temporary)


def is_sparse(path: Path) -> bool:
    """Whether a safetensors file was written by `export_sparse`."""
    with safe_open(path, framework="pt") as file:
        return "sparse" in (file.metadata() or {})


def read_weights(path: Path) -> dict[str, Tensor]:
    """The dense state dict in a safetensors file, sparse or not."""
    return load_sparse(path) if is_sparse(path) else load_file(path)


def dense_bytes(path: Path) -> int:
    """How many bytes the tensors of a safetensors file take when they are dense, without the header."""
    return sum(value.numel() * value.element_size() for value in read_weights(path).values())
