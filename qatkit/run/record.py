"""The records of a stage: ``stage.json`` for a finished stage, ``started.json`` for a stage in training.

Both contain their schema version and a digest of their own content. A corrupt record, or a record with a different
schema, raises an error. ``stage.json`` also contains the digests of the stage's files; see `qatkit.run.stage_files`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from qatkit.common.records import read_signed, write_signed
from qatkit.quantization.folding import Fold
from qatkit.run.architecture import Architecture

SCHEMA = 1
"""Version of the records that this version of qatkit writes; no other version can be read."""

EarlyStopped = TypedDict(
    "EarlyStopped", {"stopped": bool, "steps": int, "best_step": int, "val/loss": float}
)  # fmt: skip
"""Whether a stage was ``stopped`` early, its number of ``steps``, and its best validation."""


@dataclass(frozen=True)
class StageRecord:
    """The content of ``stage.json``."""

    name: str
    fingerprint: str
    inputs: dict[str, Any]
    """Inputs of the result: dotted recipe keys and their values."""
    folds: list[Fold] = field(default_factory=list)
    """Pairs of convolution and BatchNorm that were folded in this or an earlier stage."""
    zeros: dict[str, int] = field(default_factory=dict)
    """The number of zeros of every layer whose pruned weights stay zero, counted in the saved weights."""
    metrics: dict[str, float] = field(default_factory=dict)
    cost: dict[str, int] = field(default_factory=dict)
    """``parameters``, and ``macs`` (multiply-accumulate operations) for one sample of the test split."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    architecture: Architecture | None = None
    """The architecture of the model, if it differs from the recipe's model."""
    early_stopping: EarlyStopped | None = None
    """The effect of early stopping, if the stage has such a block."""
    files: dict[str, str] = field(default_factory=dict)
    """The SHA-256 digests of the stage's files by their paths in its folder, set when they are saved."""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """The content of ``started.json``: the inputs with which a stage was started."""

    inputs: dict[str, Any]
    fingerprint: str
    processes: int | None = None
    """Number of training processes; None until rank 0 knows it."""


_AGAIN = "use --force to rerun the stage"


def write_record(folder: Path, record: StageRecord) -> None:
    """Write ``stage.json``, which marks the stage as finished."""
    write_signed(folder / "stage.json", asdict(record), SCHEMA, partial(json.dumps, indent=1))


def read_record(folder: Path) -> StageRecord | None:
    """Read the record of a finished stage; None if the stage is not finished.

    Raises:
        QatkitError: ``stage.json`` is corrupt or has a different schema.
    """
    content = read_signed(folder / "stage.json", StageRecord, SCHEMA, _AGAIN)
    if content is None:
        return None
    content["folds"] = [(conv, bn) for conv, bn in content["folds"]]
    if content["architecture"] is not None:
        content["architecture"] = Architecture.from_plain(content["architecture"])
    return StageRecord(**content)


def write_started(folder: Path, started: Started) -> None:
    """Write ``started.json``."""
    write_signed(folder / "started.json", asdict(started), SCHEMA)


def read_started(folder: Path) -> Started | None:
    """Read the inputs with which an unfinished stage was started; None if it has not been started.

    Raises:
        QatkitError: ``started.json`` is corrupt or has a different schema.
    """
    content = read_signed(folder / "started.json", Started, SCHEMA, _AGAIN)
    return Started(**content) if content is not None else None
