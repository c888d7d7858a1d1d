"""The records of a stage: ``stage.json`` of a finished one, ``started.json`` of one that is being trained.

Both hold their schema version and a digest of their own content. A damaged record, or one of a
different schema, is refused. ``stage.json`` also holds the digests of the stage's files; see `qatkit.run.stage_files`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from qatkit.common.files import write_atomically
from qatkit.errors import QatkitError
from qatkit.quantization.folding import Fold
from qatkit.run.architecture import Architecture

SCHEMA = 1
"""Version of the records that this qatkit writes; it reads no other version."""


@dataclass(frozen=True)
class StageRecord:
    """The content of ``stage.json``."""

    name: str
    fingerprint: str
    inputs: dict[str, Any]
    """Inputs of the result: dotted recipe keys and their values."""
    folds: list[Fold] = field(default_factory=list)
    """Pairs of convolution and BatchNorm that were folded, in this stage or before."""
    zeros: dict[str, int] = field(default_factory=dict)
    """The number of zeros of every layer whose pruned weights stay zero, counted in the saved weights."""
    metrics: dict[str, float] = field(default_factory=dict)
    cost: dict[str, int] = field(default_factory=dict)
    """``parameters``, and ``macs``: multiply-adds for one sample of the test split."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    architecture: Architecture | None = None
    """The architecture of the model, if it is not the recipe's model."""
    early_stopping: dict[str, Any] | None = None
    """With early stopping: whether it ``stopped`` the stage, after how many ``steps``, and the best validation: its
    ``best_step`` and ``val/loss``."""
    files: dict[str, str] = field(default_factory=dict)
    """The SHA-256 digests of the stage's files by their paths in its folder, set when they are saved."""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """The content of ``started.json``: the inputs that a stage was started with."""

    inputs: dict[str, Any]
    fingerprint: str
    processes: int | None = None
    """Number of training processes; None until the first process knows it."""


_TYPES: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "fingerprint": str,
    "inputs": dict,
    "folds": list,
    "zeros": dict,
    "metrics": dict,
    "cost": dict,
    "layers": list,
    "architecture": (dict, type(None)),
    "early_stopping": (dict, type(None)),
    "files": dict,
    "seconds": (int, float),
    "versions": dict,
    "processes": (int, type(None)),
}
"""The JSON types of the fields of both records."""


def write_record(folder: Path, record: StageRecord) -> None:
    """Write ``stage.json``; from then on the stage is finished."""
    _write(folder / "stage.json", record, indent=1)


def read_record(folder: Path) -> StageRecord | None:
    """The record of a finished stage, or None if the stage is not finished.

    Raises:
        QatkitError: ``stage.json`` is damaged or has a different schema.
    """
    path = folder / "stage.json"
    content = _read(path, StageRecord)
    if content is None:
        return None
    try:
        content["folds"] = [(str(conv), str(bn)) for conv, bn in content["folds"]]
        if content["architecture"] is not None:
            content["architecture"] = Architecture.from_plain(content["architecture"])
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    return StageRecord(**content)


def write_started(folder: Path, started: Started) -> None:
    """Write ``started.json``."""
    _write(folder / "started.json", started)


def read_started(folder: Path) -> Started | None:
    """The inputs that an unfinished stage was started with, or None if it was not started.

    Raises:
        QatkitError: ``started.json`` is damaged or has a different schema.
    """
    content = _read(folder / "started.json", Started)
    return Started(**content) if content is not None else None


def content_digest(content: Mapping[str, Any]) -> str:
    """The SHA-256 digest of the content of a record, as canonical JSON without the field ``digest``.

    Example:
        >>> content_digest({"b": 1, "a": 2}) == content_digest({"a": 2, "b": 1, "digest": "any"})
        True
    """
    fields_of = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(fields_of, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _write(path: Path, record: StageRecord | Started, indent: int | None = None) -> None:
    content = {"schema": SCHEMA} | asdict(record)
    write_atomically(path, json.dumps(content | {"digest": content_digest(content)}, indent=indent))


def _read(path: Path, kind: type[StageRecord] | type[Started]) -> dict[str, Any] | None:
    """The fields of a record by name, complete and of the right types."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it contains a {type(content).__name__}, not an object")
    digest = content.pop("digest", None)
    signed = content_digest(content)
    schema = content.pop("schema", None)
    if schema != SCHEMA:
        versions = content.get("versions")
        writer = versions.get("qatkit") if isinstance(versions, dict) else None
        raise QatkitError(
            f"{path} has schema {schema}, but this version of qatkit reads schema {SCHEMA}",
            advice="use --force to run the stage again, or use "
            f"{f'qatkit {writer}, which' if writer else 'the version that'} wrote it",
        )
    if digest != signed:
        raise _damaged(path, "its digest does not match its content")
    names = {part.name for part in fields(kind)}
    if missing := sorted(names - set(content)):
        raise _damaged(path, f"{', '.join(missing)} is missing")
    if unknown := sorted(set(content) - names):
        raise _damaged(path, f"unknown field {', '.join(unknown)}")
    for name, value in content.items():
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            raise _damaged(path, f"{name} is a {type(value).__name__}")
    return content


def _damaged(path: Path, reason: str) -> QatkitError:
    return QatkitError(f"{path} is damaged ({reason})", advice="restore it, or use --force to run the stage again")
