"""Stages that the runs of a sweep share: ``SWEEP/runs/NUMBER/stages.json`` names folders in ``SWEEP/stages``.

The name of a shared folder ends with the stage's fingerprint, so runs with an equal stage name the same folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from qatkit.common.records import read_signed, write_signed
from qatkit.errors import QatkitError

SCHEMA = 1
"""Version of ``stages.json``."""
_NAME = re.compile(r"[A-Za-z0-9_]+-[0-9a-f]{16}")


class _Shared(TypedDict):
    """The content of ``stages.json``."""

    folders: dict[str, str]


def shared_name(stage: str, fingerprint: str) -> str:
    """Return the name of the folder of a shared stage.

    Example:
        >>> shared_name("dense", "0123456789abcdef" * 4)
        'dense-0123456789abcdef'
    """
    return f"{stage}-{fingerprint[:16]}"


def sweep_folder(out: Path) -> Path:
    """Return the folder of the sweep to which a run belongs."""
    return out.parent.parent


def share_stages(out: Path, folders: Mapping[str, str]) -> None:
    """Make a run of a sweep use shared stages.

    Args:
        out: The run's folder, ``SWEEP/runs/NUMBER``.
        folders: The name of the folder in ``SWEEP/stages`` for every stage.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_signed(out / "stages.json", {"folders": dict(folders)}, SCHEMA)


def shared_stages(out: Path) -> dict[str, Path]:
    """Return the folders of the stages that a run shares; empty if it does not belong to a sweep.

    Raises:
        QatkitError: ``stages.json`` is corrupt, or names a folder outside ``SWEEP/stages``.
    """
    path = out / "stages.json"
    content = read_signed(path, _Shared, SCHEMA, "run `qatkit sweep` again to rewrite it")
    if content is None:
        return {}
    for name in content["folders"].values():
        if not _NAME.fullmatch(name):
            raise QatkitError(f"'{name}' is not the name of a shared stage", key=str(path), advice="restore the file")
    return {stage: sweep_folder(out) / "stages" / name for stage, name in content["folders"].items()}
