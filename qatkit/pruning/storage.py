"""Store pruned weights without their zeros.

Bytes per weight, where b is the size of a value (4 for float32, 2 for bfloat16) and s the sparsity:

    dense     b
    bitmask   b * (1 - s) + 1/8              one bit per weight, and the non-zero values
    csr       (b + 2) * (1 - s), and 4 per row    a column index for each value; 4 bytes instead of 2 over 65536 columns

| fraction of the dense size, by sparsity | 50% | 75% | 90% | 95% | 99% |
| --- | --- | --- | --- | --- | --- |
| bitmask, float32 | 53.1% | 28.1% | 13.1% | 8.1% | 4.1% |
| csr, float32 | 75.0% | 37.5% | 15.0% | 7.5% | 1.5% |
| bitmask, bfloat16 | 56.2% | 31.2% | 16.2% | 11.2% | 7.2% |
| csr, bfloat16 | 100.0% | 50.0% | 20.0% | 10.0% | 2.0% |

The table omits CSR's 4 bytes per row, which are less than 0.05% for a layer with 4096 inputs. `stored_bytes` is exact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qatkit.errors import QatkitError, did_you_mean

Format = Literal["dense", "bitmask", "csr"]
FORMATS: tuple[Format, ...] = ("dense", "bitmask", "csr")
WIDE = 1 << 16
"""Number of columns that a 2-byte index can address."""


def stored_bytes(weight: Tensor, form: Format) -> int:
    """Return the size of a weight in a file, in bytes, without the header.

    Args:
        weight: Any shape; "csr" flattens all dimensions except the first into columns.
        form: "dense", "bitmask" or "csr".
    """
    if form == "dense":
        return weight.numel() * weight.element_size()
    kept = int(torch.count_nonzero(weight))
    if form == "bitmask":
        return kept * weight.element_size() + -(-weight.numel() // 8)
    rows = weight.shape[0]
    return kept * (weight.element_size() + (2 if weight.numel() // rows <= WIDE else 4)) + 4 * (rows + 1)


def save_sparse(state: Mapping[str, Tensor], path: Path, form: Format | None = None) -> dict[str, Format]:
    """Write a state dict to a safetensors file, with pruned weights stored without their zeros.

    Args:
        state: Tensors by name.
        path: The output file.
        form: Storage form of float tensors with two or more dimensions, used where it is smaller than dense. The
            default is the smallest form of each tensor.

    Returns:
        The form of every tensor.

    Raises:
        QatkitError: the form is unknown, or a tensor has the same name as a stored part of another tensor.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_sparse({"weight": torch.eye(64), "bias": torch.ones(64)}, Path(folder) / "model.safetensors")
        {'weight': 'csr', 'bias': 'dense'}
    """
    if form is not None and form not in FORMATS:
        raise QatkitError(f"'{form}' is unknown", key="form", advice=did_you_mean(form, FORMATS))
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, object]] = {}
    forms: dict[str, Format] = {}
    for name, tensor in state.items():
        value = tensor.detach().cpu().contiguous()
        forms[name] = _smallest(value, form)
        if forms[name] == "dense":
            tensors[name] = value.clone()  # safetensors refuses tensors that share memory
            continue
        described[name] = {
            "form": forms[name],
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
        }
        parts = _bitmask(value) if forms[name] == "bitmask" else _csr(value)
        for part, content in parts.items():
            if f"{name}.{part}" in state:
                raise QatkitError(
                    f"tensor '{name}.{part}' has the same name as a stored part of '{name}'", advice="rename the tensor"
                )
            tensors[f"{name}.{part}"] = content
    save_file(tensors, path, metadata={"format": "pt", "sparse": json.dumps(described)})
    return forms


def load_sparse(path: Path) -> dict[str, Tensor]:
    """Read a file written by `save_sparse` into dense tensors, which equal the saved tensors.

    Raises:
        QatkitError: the file was not written by `save_sparse`.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "sparse" not in metadata:
            raise QatkitError(
                "the file was not written by save_sparse", key=str(path), advice="use safetensors.torch.load_file"
            )
        described = json.loads(metadata["sparse"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is not a mapping
    for name, about in described.items():
        values = tensors.pop(f"{name}.values")
        shape, dtype = about["shape"], getattr(torch, about["dtype"])
        whole = torch.zeros(shape, dtype=dtype)
        if about["form"] == "bitmask":
            mask = _unpacked(tensors.pop(f"{name}.bitmask"), whole.numel())
            whole.view(-1)[mask] = values
        else:
            columns, starts = tensors.pop(f"{name}.columns"), tensors.pop(f"{name}.row_starts")
            rows = torch.repeat_interleave(torch.arange(shape[0]), starts.long().diff())
            whole.view(shape[0], -1)[rows, columns.long()] = values
        tensors[name] = whole
    return tensors


def _smallest(value: Tensor, form: Format | None) -> Format:
    # torch cannot count zeros in 8-bit floats
    if value.dim() < 2 or not value.numel() or not value.is_floating_point() or value.element_size() < 2:
        return "dense"
    candidates = FORMATS if form is None else ("dense", form)
    return min(candidates, key=lambda candidate: stored_bytes(value, candidate))


def _bitmask(value: Tensor) -> dict[str, Tensor]:
    mask = (value != 0).view(-1)
    padded = torch.zeros(-(-len(mask) // 8) * 8, dtype=torch.uint8)
    padded[: len(mask)] = mask
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    return {"values": value.view(-1)[mask], "bitmask": (padded.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)}


def _unpacked(packed: Tensor, count: int) -> Tensor:
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.view(-1)[:count].bool()


def _csr(value: Tensor) -> dict[str, Tensor]:
    rows = value.view(value.shape[0], -1)
    mask = rows != 0
    columns = mask.nonzero()[:, 1]
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32)
    starts[1:] = mask.sum(dim=1).cumsum(0)
    narrow = rows.shape[1] <= WIDE
    return {"values": rows[mask], "columns": columns.to(torch.uint16 if narrow else torch.int32), "row_starts": starts}
