"""Cached teacher: top-k teacher outputs for every training token, stored on disk and looked up by sample.

`qatkit.distillation.store` defines the file format and the bytes per token; `qatkit.distillation.keys` defines how
samples are identified.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.distillation.keys import inputs_of, present_tokens, sample_keys
from qatkit.distillation.manifest import KEY, Manifest, Settings, read_manifest
from qatkit.distillation.sparse import sparse_kd_loss
from qatkit.distillation.store import STATES, Targets, open_table, pack, spread, table_bytes, unpack, write_bytes
from qatkit.errors import QatkitError

Outputs = Tensor | tuple[Tensor, Mapping[str, Tensor]]
"""Logits ``[samples, length, classes]`` or ``[samples, classes]``, optionally with hidden states by layer name."""


def cache_teacher(
    teacher: Callable[[Any], Outputs],
    batches: Iterable[Any],
    folder: Path,
    fingerprint: Mapping[str, str],
    k: int = 64,
    temperature: float = 1.0,
    shard_batches: int = 64,
) -> int:
    """Write the teacher's top-k classes for every token; a killed run resumes where it stopped.

    Args:
        teacher: Called with each batch; returns logits, optionally with hidden states by layer name.
        batches: All batches, in the same order in every run, which determines the sample indices. If a batch is a
            mapping, tokens whose "attention_mask" is 0 are ignored.
        folder: Output folder for Arrow files of `shard_batches` batches each, and a manifest.
        fingerprint: Inputs that determine the cache, such as hashes of model, tokenizer and data order; see
            `model_hash`.
        k: Number of classes kept per token.
        temperature: Divides the logits. The cache is valid for this temperature only.
        shard_batches: Batches per file; at most this many are recomputed after an interruption.

    Returns:
        The number of samples in the cache.

    Raises:
        QatkitError: the folder contains a cache that is corrupt or has a different fingerprint; logits contain NaN or
            have more than three dimensions; `k` is out of range; or a hidden state does not match the logits or exceeds
            the range of float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(k, temperature, shard_batches)
    manifest = read_manifest(folder)
    if manifest is None:
        manifest = Manifest(dict(fingerprint), settings)
        manifest.write(folder)
    manifest.refuse_changes(folder, fingerprint, settings)
    if manifest.samples is not None:
        manifest.check_files(folder)
        return manifest.samples
    remaining = iter(batches)
    samples = tokens = shard = 0
    while part := list(islice(remaining, shard_batches)):
        path = folder / f"{shard:06d}.arrow"
        if path.name in manifest.files and path.exists():
            manifest.check_file(path)
            _refuse_order(folder, path, part)
        else:
            write_bytes(path, _shard(teacher, part, k, temperature, shard * shard_batches))
            manifest = manifest.with_file(path)
            manifest.write(folder)
        table = open_table([path])
        samples += table.num_rows
        tokens += sum(len(column) // 2 for column in table["log_tail"].to_pylist())  # two bytes each
        shard += 1
    if shard == 0:
        raise QatkitError("the data has no batches", key=KEY, advice="check the training data")
    replace(manifest, samples=samples, tokens=tokens).write(folder)
    return samples


class CachedTeacher:
    """Read teacher outputs written by `cache_teacher`.

    Args:
        folder: The cache folder.
        fingerprint: Must equal the fingerprint with which the cache was written.
        command: The command that writes the cache, for errors.

    Raises:
        QatkitError: there is no cache, or it is incomplete, corrupt or has a different fingerprint.
    """

    def __init__(
        self, folder: Path, fingerprint: Mapping[str, str], command: str = "cache_teacher(..., folder)"
    ) -> None:
        manifest = read_manifest(folder)
        if manifest is None:
            raise QatkitError(f"no cache in {folder}", key=KEY, advice=f"run {command} first")
        manifest.refuse_changes(folder, fingerprint)
        if manifest.tokens is None:
            raise QatkitError(f"{folder} is incomplete", key=KEY, advice=f"run {command} again to resume")
        manifest.check_files(folder)
        self.folder = folder
        self.k = manifest.settings.k
        self.temperature = manifest.settings.temperature
        self.tokens: int = manifest.tokens
        """Number of tokens in all samples."""
        self._command = command
        self._table = open_table([folder / name for name in manifest.files])
        self.classes = int(self._table.schema.metadata[b"classes"])
        """Number of classes of the teacher's logits."""
        self.layers = [name.removeprefix(STATES) for name in self._table.schema.names if name.startswith(STATES)]
        """Names of the teacher layers whose hidden states are cached."""
        keys = self._table["key"].to_pylist()
        self._rows: dict[bytes, int] = dict(zip(keys, range(len(keys)), strict=True))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __call__(self, samples: Sequence[int] | Tensor) -> Targets:
        """Look up teacher outputs by sample number.

        Args:
            samples: Numbers from 0, in the order in which the samples were cached.

        Raises:
            QatkitError: an argument is out of range.
        """
        numbers = [int(number) for number in samples]
        if not all(0 <= number < len(self) for number in numbers):
            raise QatkitError(
                f"{numbers} are not all in the cache", key="samples", advice=f"use indices from 0 to {len(self) - 1}"
            )
        return unpack([self._table.slice(number, 1).to_pylist()[0] for number in numbers], self.k)

    def outputs_for(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Targets:
        """Look up teacher outputs by the inputs of a student call, and align them with its tokens.

        Args:
            args: Positional inputs of the student.
            kwargs: Keyword inputs of the student.

        Raises:
            QatkitError: a sample is not in the cache.
        """
        rows = [self._rows.get(key) for key in sample_keys(args, kwargs)]
        missing = [place for place, row in enumerate(rows) if row is None]
        if missing:
            raise QatkitError(
                f"{len(missing)} of the {len(rows)} samples in a batch are not among the {len(self)} in {self.folder}: "
                "the cache is shorter than the data, or a random augmentation changed the samples",
                key=KEY,
                advice=f"remove the augmentation, or delete the folder and run {self._command} over all data",
            )
        return spread(self([row for row in rows if row is not None]), present_tokens(args, kwargs))

    def loss(
        self,
        student: Tensor,
        samples: Sequence[int] | Tensor,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Compute `sparse_kd_loss` against the cache, at its temperature.

        Args:
            student: Logits ``[samples, length, classes]``; positions beyond the cached length are padding.
            samples: Sample indices ``[samples]``.
            mask: True at positions to include ``[samples, length]``.
            labels: Class indices ``[samples, length]``; positions labeled -100 are ignored.

        Raises:
            QatkitError: an argument is out of range.
        """
        targets = self(samples)
        missing = student.shape[1] - targets.mask.shape[1]
        indices, log_p = (
            nn.functional.pad(part, (0, 0, 0, missing)).to(student.device) for part in (targets.indices, targets.log_p)
        )
        log_tail, cached = (
            nn.functional.pad(part, (0, missing)).to(student.device) for part in (targets.log_tail, targets.mask)
        )
        mask = cached if mask is None else cached & mask.bool()
        return sparse_kd_loss(student, indices, log_p, log_tail, self.temperature, mask, labels)


def model_hash(model: nn.Module) -> str:
    """Hash a model's weights and their names for a fingerprint."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _shard(teacher: Callable[[Any], Outputs], part: Sequence[Any], k: int, temperature: float, first: int) -> bytes:
    """The Arrow file of some batches, numbered from `first`."""
    rows: list[dict[str, bytes]] = []
    classes = 0
    for number, batch in enumerate(part, start=first):
        with torch.no_grad():
            outputs = teacher(batch)
        logits, hidden = outputs if isinstance(outputs, tuple) else (outputs, {})
        args, kwargs = inputs_of(batch)
        present = present_tokens(args, kwargs)
        if logits.dim() != 3 or (present is not None and present.shape != logits.shape[:2]):
            present = None
        _check_outputs(logits, hidden, present, number)
        if logits.dim() == 2:  # one output per sample
            logits = logits[:, None]
        rows += pack(logits, sample_keys(args, kwargs), k, temperature, present, hidden)
        classes = logits.shape[-1]
    return table_bytes(rows, classes)


def _check_outputs(logits: Tensor, hidden: Mapping[str, Tensor], present: Tensor | None, number: int) -> None:
    """Reject outputs that a cache cannot store; padding is not stored and may contain anything."""
    if logits.dim() not in (2, 3):
        raise QatkitError(
            f"the teacher's logits have shape {list(logits.shape)}, but a cache stores [samples, classes] or "
            "[samples, length, classes]",
            key=KEY,
            advice="use a live teacher",
        )
    counted = slice(None) if present is None else present.to(logits.device)
    if logits[counted].isnan().any():
        raise QatkitError(
            f"the teacher's logits for batch {number} (counting from 0) contain NaN",
            key="teacher",
            advice="check that batch",
        )
    for name, state in hidden.items():
        if state.shape[:-1] != logits.shape[:-1]:
            raise QatkitError(
                f"layer '{name}' returns {list(state.shape)} for logits {list(logits.shape)}, but a cache stores one "
                "vector per output",
                key=KEY,
                advice="compare another layer, or use a live teacher",
            )
        if not state[counted].half().isfinite().all():
            raise QatkitError(
                f"layer '{name}' returns values up to {state[counted].abs().max():.3g}, but a cache stores "
                "float16 values of at most 65504",
                key=KEY,
                advice="compare a layer after a normalization, or use a live teacher",
            )


def _refuse_order(folder: Path, path: Path, part: Sequence[Any]) -> None:
    """Refuse to resume a cache whose data come in a different order."""
    keys = [key for batch in part for key in sample_keys(*inputs_of(batch))]
    if keys != open_table([path])["key"].to_pylist():
        raise QatkitError(
            f"the samples in {path} differ from the current data: the order, the batch size or the data changed",
            key=KEY,
            advice=f"delete {folder} and rebuild the cache",
        )
