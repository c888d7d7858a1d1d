"""Rows of a teacher cache in Arrow files: a sample each, its tokens packed.

A token costs ``4 * k + 2`` bytes up to 65,536 classes and ``5 * k + 2`` above: class numbers in 16 or 24 bits,
log-probabilities and that of all other classes in float16. For k = 64 these are 258 and 322 bytes. A hidden state costs
2 bytes for each of its numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qatkit.distillation.sparse import top_k_log_probabilities

SHORT = 1 << 16
"""Classes that 16 bits can number."""
LOWEST = torch.finfo(torch.float16).min
STATES = "hidden:"
"""What stands before a layer's name in the name of its column."""


@dataclass(frozen=True)
class Targets:
    """What the teacher said of some samples, padded to the longest."""

    indices: Tensor
    """Classes int64 ``[samples, length, k]``."""
    log_p: Tensor
    """Their log-probabilities float32 ``[samples, length, k]``."""
    log_tail: Tensor
    """The log-probability of all other classes ``[samples, length]``."""
    mask: Tensor
    """True where the cache holds a token ``[samples, length]``."""
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    """The outputs of layers of the teacher by name, float32 ``[samples, length, width]``, where they were asked for."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Targets:
        """The same with every tensor changed by a function."""
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
    """A row for every sample.

    Args:
        logits: The teacher's ``[samples, length, classes]``.
        keys: Of the samples.
        k: Classes kept of every token.
        temperature: Of the probabilities.
        present: True where a token counts ``[samples, length]``; the others are not kept.
        hidden: States by the layer's name ``[samples, length, width]``.
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
    """What `pack` packed, padded to the longest sample."""
    parts = [_unpack(row, k) for row in rows]
    lengths = torch.tensor([len(part["log_tail"]) for part in parts])
    padded = {name: pad_sequence([part[name] for part in parts], batch_first=True) for name in parts[0]}
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    hidden = {name.removeprefix(STATES): state for name, state in padded.items() if name.startswith(STATES)}
    return Targets(padded["indices"], padded["log_p"], padded["log_tail"], mask, hidden)


def spread(targets: Targets, present: Tensor | None) -> Targets:
    """Put each sample's tokens where a batch has them: the cache holds no padding.

    Args:
        targets: What `unpack` returned.
        present: The attention mask of the batch ``[samples, length]``; None where no sample is padded.
    """
    if present is None or bool(present.all()):
        return targets
    present = present.to(targets.mask.device)  # the batch may be on a GPU, and what is read from a file is not

    def place(part: Tensor) -> Tensor:
        out = part.new_zeros(*present.shape, *part.shape[2:])
        out[present] = part[targets.mask]
        return out

    return targets.map(place)


def table_bytes(rows: list[dict[str, bytes]], classes: int) -> bytes:
    """Rows as an Arrow file, with the number of classes beside them."""
    import pyarrow as pa

    table = pa.Table.from_pylist(rows).replace_schema_metadata({"classes": str(classes)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def open_table(paths: Sequence[Path]) -> Any:
    """The Arrow files as one table, mapped into memory and read when it is asked for."""
    import pyarrow as pa

    return pa.concat_tables([pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths])


def write_whole(path: Path, content: bytes) -> None:
    """Whole or not at all: a file that is there is complete, whenever the process was killed."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


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
