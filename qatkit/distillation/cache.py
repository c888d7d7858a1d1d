"""A teacher that ran once: its best classes for every token on disk, served by the number of the sample.

A token costs ``4 * k + 2`` bytes up to 65,536 classes and ``5 * k + 2`` above: class numbers in 16 or 24 bits,
log-probabilities and that of all other classes in float16. For k = 64 these are 258 and 322 bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.distillation.sparse import sparse_kd_loss, top_k_log_probabilities
from qatkit.errors import QatkitError

MANIFEST = "cache.json"
SHORT = 1 << 16
"""Classes that 16 bits can number."""
LOWEST = torch.finfo(torch.float16).min


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


def cache_teacher(
    teacher: Callable[[Any], Tensor],
    batches: Iterable[Any],
    folder: Path,
    fingerprint: Mapping[str, str],
    k: int = 64,
    temperature: float = 1.0,
    shard_batches: int = 64,
) -> int:
    """Write the teacher's k most probable classes of every token, and go on where a run that was killed stopped.

    Args:
        teacher: Answers a batch with logits ``[samples, length, classes]``.
        batches: All batches, in the same order in every run; samples are numbered from 0 as they come.
        folder: Where to; Arrow files of `shard_batches` batches each, and a manifest.
        fingerprint: What the cache depends on, such as hashes of model, tokenizer and data order; see `model_hash`.
        k: Classes kept of every token.
        temperature: Of the probabilities: those at another cannot be had from them.
        shard_batches: Batches of a file; at most so many are computed again after a kill.

    Returns:
        How many samples the cache holds.

    Raises:
        QatkitError: the folder holds a cache of something else, the logits hold NaN, or `k` is out of range.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"k": k, "temperature": temperature, "shard_batches": shard_batches}
    manifest = folder / MANIFEST
    if manifest.exists():
        found = json.loads(manifest.read_text())
        _refuse_changes(folder, found, dict(fingerprint), settings)
        if "samples" in found:
            return int(found["samples"])
    else:
        found = {"fingerprint": dict(fingerprint), "settings": settings}
        _write(manifest, json.dumps(found, indent=1).encode())
    remaining = iter(batches)
    samples = shard = 0
    while part := list(islice(remaining, shard_batches)):
        path = folder / f"{shard:06d}.arrow"
        if not path.exists():
            rows = []
            for number, batch in enumerate(part, start=shard * shard_batches):
                with torch.no_grad():
                    rows += list(_rows(teacher(batch), k, temperature, number))
            _write(path, _table(rows))
        samples += _length(path)
        shard += 1
    _write(manifest, json.dumps(found | {"samples": samples, "shards": shard}, indent=1).encode())
    return samples


class CachedTeacher:
    """Serves what `cache_teacher` wrote.

    Args:
        folder: Of the cache.
        fingerprint: What it must have been made from.

    Raises:
        QatkitError: there is no cache, it is not complete, or it was made from something else.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, str]) -> None:
        import pyarrow as pa  # type: ignore[import-untyped]

        manifest = folder / MANIFEST
        if not manifest.exists():
            raise QatkitError(f"teacher cache: {folder} holds none; run cache_teacher(..., folder) first")
        found = json.loads(manifest.read_text())
        _refuse_changes(folder, found, dict(fingerprint), found["settings"])
        if "samples" not in found:
            raise QatkitError(f"teacher cache: {folder} is not complete; run cache_teacher again, it goes on by itself")
        self.k: int = found["settings"]["k"]
        self.temperature: float = found["settings"]["temperature"]
        files = [pa.memory_map(str(folder / f"{shard:06d}.arrow")) for shard in range(found["shards"])]
        self._table = pa.concat_tables([pa.ipc.open_file(file).read_all() for file in files])

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __call__(self, samples: Sequence[int] | Tensor) -> Targets:
        """What the teacher said of these samples.

        Args:
            samples: Numbers, from 0, in the order of the batches that were cached.

        Raises:
            QatkitError: a number is out of range.
        """
        numbers = [int(number) for number in samples]
        if not all(0 <= number < len(self) for number in numbers):
            raise QatkitError(f"samples: {numbers} are not all in the cache; it holds 0 to {len(self) - 1}")
        rows = [self._table.slice(number, 1).to_pylist()[0] for number in numbers]
        parts = [_unpack(row, self.k) for row in rows]
        lengths = torch.tensor([len(part[2]) for part in parts])
        indices, log_p, log_tail = (
            nn.utils.rnn.pad_sequence([part[place] for part in parts], batch_first=True) for place in range(3)
        )
        return Targets(indices, log_p, log_tail, torch.arange(int(lengths.max())) < lengths[:, None])

    def loss(
        self,
        student: Tensor,
        samples: Sequence[int] | Tensor,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """`sparse_kd_loss` against the cache, at the temperature it was made with.

        Args:
            student: Logits ``[samples, length, classes]``; a length that differs from the cache's is padding.
            samples: Numbers of the samples ``[samples]``.
            mask: True where a position counts ``[samples, length]``.
            labels: Class numbers ``[samples, length]``; a position with -100 does not count.

        Raises:
            QatkitError: a number is out of range.
        """
        targets = self(samples)
        missing = student.shape[1] - targets.mask.shape[1]
        indices, log_p = (
            nn.functional.pad(part, (0, 0, 0, missing)).to(student.device) for part in (targets.indices, targets.log_p)
        )
        log_tail, held = (
            nn.functional.pad(part, (0, missing)).to(student.device) for part in (targets.log_tail, targets.mask)
        )
        mask = held if mask is None else held & mask.bool()
        return sparse_kd_loss(student, indices, log_p, log_tail, self.temperature, mask, labels)


def model_hash(model: nn.Module) -> str:
    """A hash of a model's weights and their names, for a fingerprint."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _rows(logits: Tensor, k: int, temperature: float, batch: int) -> Iterator[dict[str, bytes]]:
    """A sample each: the bytes of its tokens."""
    if logits.isnan().any():
        raise QatkitError(f"teacher: its logits for batch {batch}, counted from 0, hold NaN; check that batch")
    indices, log_p, log_tail = (part.cpu() for part in top_k_log_probabilities(logits, k, temperature))
    columns = {
        "low": (indices % SHORT).to(torch.uint16),
        "high": (indices // SHORT).to(torch.uint8),
        "log_p": log_p.clamp(min=LOWEST).half(),
        "log_tail": log_tail.clamp(min=LOWEST).half(),
    }
    if logits.shape[-1] <= SHORT:
        columns["high"] = columns["high"][..., :0]
    for sample in range(len(logits)):
        yield {name: column[sample].numpy().tobytes() for name, column in columns.items()}


def _unpack(row: dict[str, bytes], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Classes ``[length, k]``, their log-probabilities, and those of the tail ``[length]``."""

    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(bytearray(row[name]), dtype=dtype)

    indices = column("low", torch.uint16).long().view(-1, k)
    if row["high"]:
        indices += column("high", torch.uint8).long().view(-1, k) * SHORT
    log_p, log_tail = column("log_p", torch.float16).float(), column("log_tail", torch.float16).float()
    return indices, log_p.view(-1, k), log_tail


def _table(rows: list[dict[str, bytes]]) -> bytes:
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _length(path: Path) -> int:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        return int(pa.ipc.open_file(file).read_all().num_rows)


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: a file that is there is complete, whenever the process was killed."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _refuse_changes(folder: Path, found: dict[str, Any], fingerprint: dict[str, str], settings: dict[str, Any]) -> None:
    was, now = found["fingerprint"] | found["settings"], fingerprint | settings
    changes = [
        f"{key}: was {was.get(key, 'absent')}, is now {now.get(key, 'absent')}"
        for key in dict.fromkeys([*was, *now])
        if was.get(key) != now.get(key)
    ]
    if changes:
        raise QatkitError(
            f"teacher cache: {folder} was made from something else:\n  " + "\n  ".join(changes) + "\n"
            "write another folder, or delete this one"
        )
