"""A teacher that ran once: its best classes for every token on disk, served for the samples of any batch.

`qatkit.distillation.store` says what a token costs, `qatkit.distillation.keys` how a sample is known again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.distillation.keys import inputs_of, present_tokens, sample_keys
from qatkit.distillation.sparse import sparse_kd_loss
from qatkit.distillation.store import STATES, Targets, open_table, pack, spread, table_bytes, unpack, write_whole
from qatkit.errors import QatkitError

MANIFEST = "cache.json"

Answer = Tensor | tuple[Tensor, Mapping[str, Tensor]]
"""Logits ``[samples, length, classes]`` or ``[samples, classes]``, alone or with hidden states by the layer's name."""


def cache_teacher(
    teacher: Callable[[Any], Answer],
    batches: Iterable[Any],
    folder: Path,
    fingerprint: Mapping[str, str],
    k: int = 64,
    temperature: float = 1.0,
    shard_batches: int = 64,
) -> int:
    """Write the teacher's k most probable classes of every token, and go on where a run that was killed stopped.

    Args:
        teacher: Answers a batch.
        batches: All batches, in the same order in every run; samples are numbered from 0 as they come. The tokens of a
            batch that is a mapping count where its "attention_mask" is not 0.
        folder: Where to; Arrow files of `shard_batches` batches each, and a manifest.
        fingerprint: What the cache depends on, such as hashes of model, tokenizer and data order; see `model_hash`.
        k: Classes kept of every token.
        temperature: Of the probabilities: those at another cannot be had from them.
        shard_batches: Batches of a file; at most so many are computed again after a kill.

    Returns:
        How many samples the cache holds.

    Raises:
        QatkitError: the folder holds a cache of something else, the logits hold NaN, `k` is out of range, or a state
            is no vector of an answer or beyond float16.
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
        write_whole(manifest, json.dumps(found, indent=1).encode())
    remaining = iter(batches)
    samples = tokens = shard = 0
    while part := list(islice(remaining, shard_batches)):
        path = folder / f"{shard:06d}.arrow"
        if path.exists():
            _refuse_order(folder, path, part)
        else:
            write_whole(path, _answers(teacher, part, k, temperature, shard * shard_batches))
        table = open_table([path])
        samples += table.num_rows
        tokens += sum(len(kept) // 2 for kept in table["log_tail"].to_pylist())  # two bytes each
        shard += 1
    if shard == 0:
        raise QatkitError("teacher cache: the data gave no batch; check the training data")
    done = found | {"samples": samples, "tokens": tokens, "shards": shard}
    write_whole(manifest, json.dumps(done, indent=1).encode())
    return samples


class CachedTeacher:
    """Serves what `cache_teacher` wrote.

    Args:
        folder: Of the cache.
        fingerprint: What it must have been made from.
        command: What makes it, for errors.

    Raises:
        QatkitError: there is no cache, it is not complete, or it was made from something else.
    """

    def __init__(
        self, folder: Path, fingerprint: Mapping[str, str], command: str = "cache_teacher(..., folder)"
    ) -> None:
        manifest = folder / MANIFEST
        if not manifest.exists():
            raise QatkitError(f"teacher cache: {folder} holds none; run {command} first")
        found = json.loads(manifest.read_text())
        _refuse_changes(folder, found, dict(fingerprint), found["settings"])
        if "samples" not in found:
            raise QatkitError(f"teacher cache: {folder} is not complete; run {command} again, it goes on by itself")
        self.folder = folder
        self.k: int = found["settings"]["k"]
        self.temperature: float = found["settings"]["temperature"]
        self.tokens: int = found["tokens"]
        """Of all samples together."""
        self._command = command
        self._table = open_table([folder / f"{shard:06d}.arrow" for shard in range(found["shards"])])
        self.classes = int(self._table.schema.metadata[b"classes"])
        """Of the teacher's logits."""
        self.layers = [name.removeprefix(STATES) for name in self._table.schema.names if name.startswith(STATES)]
        """Of the teacher, whose outputs are in it."""
        keys = self._table["key"].to_pylist()
        self._rows: dict[bytes, int] = dict(zip(keys, range(len(keys)), strict=True))

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
        return unpack([self._table.slice(number, 1).to_pylist()[0] for number in numbers], self.k)

    def answer(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Targets:
        """What the teacher said of the samples of a call of the student, token by token where the call has them.

        Args:
            args: What the student is called with.
            kwargs: The same by name.

        Raises:
            QatkitError: a sample is not in the cache.
        """
        rows = [self._rows.get(key) for key in sample_keys(args, kwargs)]
        missing = [place for place, row in enumerate(rows) if row is None]
        if missing:
            raise QatkitError(
                f"teacher cache: {len(missing)} of the {len(rows)} samples of a batch are not among the {len(self)} in "
                f"{self.folder}: it is shorter than the data, or a random augmentation changed them; leave the "
                f"augmentation out, or delete the folder and run {self._command} over all data"
            )
        return spread(self([row for row in rows if row is not None]), present_tokens(args, kwargs))

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


def is_complete(folder: Path) -> bool:
    """Whether `cache_teacher` came to its end in a folder."""
    manifest = folder / MANIFEST
    return manifest.exists() and "samples" in json.loads(manifest.read_text())


def fingerprint_of(folder: Path) -> dict[str, str]:
    """What a cache was made from; empty where there is none."""
    manifest = folder / MANIFEST
    found: dict[str, str] = json.loads(manifest.read_text())["fingerprint"] if manifest.exists() else {}
    return found


def model_hash(model: nn.Module) -> str:
    """A hash of a model's weights and their names, for a fingerprint."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _answers(teacher: Callable[[Any], Answer], part: Sequence[Any], k: int, temperature: float, first: int) -> bytes:
    """The file of some batches, numbered from `first`."""
    rows: list[dict[str, bytes]] = []
    classes = 0
    for number, batch in enumerate(part, start=first):
        with torch.no_grad():
            answer = teacher(batch)
        logits, hidden = answer if isinstance(answer, tuple) else (answer, {})
        if logits.isnan().any():
            raise QatkitError(f"teacher: its logits for batch {number}, counted from 0, hold NaN; check that batch")
        for name, state in hidden.items():
            _check_state(name, state, logits)
        if logits.dim() == 2:  # one answer for a whole sample
            logits = logits[:, None]
        args, kwargs = inputs_of(batch)
        present = present_tokens(args, kwargs)
        if present is not None and present.shape != logits.shape[:2]:
            present = None
        rows += pack(logits, sample_keys(args, kwargs), k, temperature, present, hidden)
        classes = logits.shape[-1]
    return table_bytes(rows, classes)


def _check_state(name: str, state: Tensor, logits: Tensor) -> None:
    if state.shape[:-1] != logits.shape[:-1]:
        raise QatkitError(
            f"teacher cache: layer '{name}' returns {list(state.shape)} for answers {list(logits.shape)}, and a cache "
            "keeps one vector for every answer; compare another layer, or take a live teacher"
        )
    if not state.half().isfinite().all():
        raise QatkitError(
            f"teacher cache: layer '{name}' returns numbers up to {state.abs().max():.3g}, and a cache keeps float16, "
            "up to 65504; compare a layer behind a normalisation, or take a live teacher"
        )


def _refuse_order(folder: Path, path: Path, part: Sequence[Any]) -> None:
    keys = [key for batch in part for key in sample_keys(*inputs_of(batch))]
    if keys != open_table([path])["key"].to_pylist():
        raise QatkitError(
            f"teacher cache: the samples of {path} are not those that the data now give in its place: another order, "
            f"another batch size or other data; delete {folder} and make it again"
        )


def _refuse_changes(folder: Path, found: dict[str, Any], fingerprint: dict[str, str], settings: dict[str, Any]) -> None:
    was, now = found["settings"] | found["fingerprint"], settings | fingerprint
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
