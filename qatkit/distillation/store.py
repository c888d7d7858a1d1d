"""Storage of a teacher cache: Arrow files with one row per sample.

A token takes ``4 * k + 2`` bytes for up to 65,536 classes and ``5 * k + 2`` bytes for more; for k = 64, that is 258 or
322 bytes. Class indices have 16 or 24 bits. Their log-probabilities and the log-probability of all other classes are
float16. A hidden state takes 2 bytes per element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qatkit.common.files import atomic_path
from qatkit.distillation.sparse import top_k_log_probabilities
from qatkit.errors import QatkitError

SHORT = 1 << 16
"""Number of classes that 16 bits can index."""
LOWEST = torch.finfo(torch.float16).min
STATES = "hidden:"
"""Prefix of the name of a column with hidden states, followed by the layer name."""


@dataclass(frozen=True)
class Targets:
    """Cached teacher outputs for some samples, padded to the longest."""

    indices: Tensor
    """Class indices, int64 ``[samples, length, k]``."""
    log_p: Tensor
    """Log-probabilities of these classes, float32 ``[samples, length, k]``."""
    log_tail: Tensor
    """The log-probability of all other classes ``[samples, length]``."""
    mask: Tensor
    """True where the cache has a token ``[samples, length]``."""
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    """Outputs of cached teacher layers by name, float32 ``[samples, length, width]``."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Targets:
        """Apply a function to every tensor."""
        return Targets(
            change(self.indices),
            change(self.log_p),
            change(self.log_tail),
            change(self.mask),
            {name: change(state) for name, state in self.hidden.items()},
        )


def pack(
    logits: Tensor,
    keys: Sequence[bytes],
    k: int,
    temperature: float,
    present: Tensor | None,
    hidden: Mapping[str, Tensor],
) -> list[dict[str, bytes]]:
    """Pack teacher outputs into one row per sample.

    Args:
        logits: Teacher logits ``[samples, length, classes]``.
        keys: Sample keys.
        k: Number of classes kept per token.
        temperature: Divides the logits.
        present: True at tokens to include ``[samples, length]``; other tokens are not stored.
        hidden: Hidden states by layer name ``[samples, length, width]``.
    """
    indices, log_p, log_tail = (part.cpu() for part in top_k_log_probabilities(logits, k, temperature))
    columns = {
        "low": (indices % SHORT).to(torch.uint16),
        "high": (indices // SHORT).to(torch.uint8),
        "log_p": log_p.clamp(min=LOWEST).half(),
        "log_tail": log_tail.clamp(min=LOWEST).half(),
    }
    if logits.shape[-1] <= SHORT:
        columns["high"] = columns["high"][..., :0]
    columns |= {STATES + name: state.cpu().half() for name, state in hidden.items()}
    rows = []
    for sample, key in enumerate(keys):
        kept = slice(None) if present is None else present[sample].cpu()
        row = {name: column[sample][kept].contiguous().numpy().tobytes() for name, column in columns.items()}
        rows.append({"key": key} | row)
    return rows


def unpack(rows: Sequence[Mapping[str, bytes]], k: int) -> Targets:
    """Unpack rows returned by `pack`, padded to the longest sample."""
    parts = [_unpack(row, k) for row in rows]
    lengths = torch.tensor([len(part["log_tail"]) for part in parts])
    padded = {name: pad_sequence([part[name] for part in parts], batch_first=True) for name in parts[0]}
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    hidden = {name.removeprefix(STATES): state for name, state in padded.items() if name.startswith(STATES)}
    return Targets(padded["indices"], padded["log_p"], padded["log_tail"], mask, hidden)


def spread(targets: Targets, present: Tensor | None) -> Targets:
    """Move each sample's tokens to their positions in a padded batch, because the cache stores no padding.

    Args:
        targets: Outputs returned by `unpack`.
        present: Attention mask of the batch ``[samples, length]``; None if no sample is padded.
    """
    if present is None or bool(present.all()):
        return targets
    present = present.to(targets.mask.device)  # the batch may be on a GPU, and cached tensors are on the CPU

    def place(part: Tensor) -> Tensor:
        out = part.new_zeros(*present.shape, *part.shape[2:])
        out[present] = part[targets.mask]
        return out

    return targets.map(place)


def table_bytes(rows: list[dict[str, bytes]], classes: int) -> bytes:
    """Serialize rows as an Arrow file whose metadata contains the number of classes."""
    import pyarrow as pa

    table = pa.Table.from_pylist(rows).replace_schema_metadata({"classes": str(classes)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def open_table(paths: Sequence[Path]) -> Any:
    """Open the Arrow files as one memory-mapped table, which is read on access.

    Raises:
        QatkitError: a file is not part of a cache.
    """
    import pyarrow as pa

    tables = []
    for path in paths:
        try:
            tables.append(pa.ipc.open_file(pa.memory_map(str(path))).read_all())
        except pa.ArrowException as error:
            raise QatkitError(
                f"{path} is not an Arrow file ({error})", advice=f"delete {path.parent} and rebuild the cache"
            ) from error
    return pa.concat_tables(tables)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: if it exists, it is complete, even if the process was killed."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _unpack(row: Mapping[str, bytes], k: int) -> dict[str, Tensor]:
    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(bytearray(row[name]), dtype=dtype) if row[name] else torch.empty(0, dtype=dtype)

    indices = column("low", torch.uint16).long().view(-1, k)
    if row["high"]:
        indices += column("high", torch.uint8).long().view(-1, k) * SHORT
    log_tail = column("log_tail", torch.float16).float()
    unpacked = {"indices": indices, "log_p": column("log_p", torch.float16).float().view(-1, k), "log_tail": log_tail}
    states = [name for name in row if name.startswith(STATES)]
    return unpacked | {name: column(name, torch.float16).float().view(len(log_tail), -1) for name in states}
