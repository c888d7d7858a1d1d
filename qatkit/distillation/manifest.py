"""The manifest of a teacher cache: its fingerprint and settings, and the digests of its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from qatkit.common.files import sha256_of
from qatkit.common.records import read_signed, write_signed
from qatkit.errors import QatkitError

NAME = "cache.json"
SCHEMA = 1
"""Version of ``cache.json``."""
KEY = "teacher cache"
"""The key used in errors about a cache."""


@dataclass(frozen=True)
class Settings:
    """The settings with which a cache is written."""

    k: int
    temperature: float
    shard_batches: int


@dataclass(frozen=True)
class Manifest:
    """The content of ``cache.json``. It is rewritten after each Arrow file, so that an interrupted run can resume."""

    fingerprint: dict[str, str]
    settings: Settings
    files: dict[str, str] = field(default_factory=dict)
    """The SHA-256 digests of the complete Arrow files by name, in sample order."""
    samples: int | None = None
    """Number of samples; None until the cache is complete."""
    tokens: int | None = None

    @property
    def complete(self) -> bool:
        """Whether the cache contains all samples."""
        return self.samples is not None and self.tokens is not None

    def write(self, folder: Path) -> None:
        """Write the manifest of a cache."""
        write_signed(folder / NAME, asdict(self), SCHEMA, partial(json.dumps, indent=1))

    def with_file(self, path: Path) -> Manifest:
        """Return the manifest with the digest of one more file."""
        return replace(self, files=self.files | {path.name: sha256_of(path)})

    def check_file(self, path: Path) -> None:
        """Compare an Arrow file to its digest.

        Raises:
            QatkitError: the file is missing or has changed.
        """
        if not path.is_file():
            raise QatkitError(f"{path} is missing", key=KEY, advice=f"restore the file, or {_again(path.parent)}")
        if sha256_of(path) != self.files[path.name]:
            raise QatkitError(
                f"{path} has changed since it was written",
                key=KEY,
                advice=f"restore the file, or {_again(path.parent)}",
            )

    def check_files(self, folder: Path) -> None:
        """Compare all Arrow files to their digests; each file is read once per process.

        Raises:
            QatkitError: a file is missing or has changed.
        """
        for name in self.files:
            self.check_file(folder / name)

    def refuse_changes(self, folder: Path, fingerprint: Mapping[str, str], settings: Settings | None = None) -> None:
        """Raise an error if the fingerprint or, if passed, the settings of a cache differ.

        Raises:
            QatkitError: they differ; the error lists each difference.
        """
        was: dict[str, Any] = asdict(self.settings) | self.fingerprint
        now = asdict(settings or self.settings) | dict(fingerprint)
        changes = [
            f"{key}: was {was.get(key, 'absent')}, is now {now.get(key, 'absent')}"
            for key in dict.fromkeys([*was, *now])
            if was.get(key) != now.get(key)
        ]
        if changes:
            raise QatkitError(
                f"{folder} was written with different inputs or settings:\n  " + "\n  ".join(changes) + "\n",
                key=KEY,
                advice="use another folder, or delete the existing cache",
            )


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a cache; None if the folder has none.

    Raises:
        QatkitError: the manifest is corrupt, or was written by another version of qatkit.
    """
    content = read_signed(folder / NAME, Manifest, SCHEMA, _again(folder))
    return None if content is None else Manifest(**content | {"settings": Settings(**content["settings"])})


def is_complete(folder: Path) -> bool:
    """Whether `cache_teacher` finished in a folder.

    Raises:
        QatkitError: as in `read_manifest`.
    """
    manifest = read_manifest(folder)
    return manifest is not None and manifest.complete


def _again(folder: Path) -> str:
    return f"delete {folder} and rebuild the cache"
