"""The verify step, which compares every exported file to the stage from which it was exported."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qatkit.common.digests import changed_file, file_digests
from qatkit.common.records import read_signed, write_signed
from qatkit.errors import QatkitError, QatkitWarning
from qatkit.export.exporting import with_companions
from qatkit.export.verification import Verification, verify
from qatkit.pipeline.export import VERDICT, first_batch, held_out_data
from qatkit.run.exports import Exported, exports_of
from qatkit.run.folder import Run
from qatkit.tasks import declared_task

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

SCHEMA = 1
"""Version of ``verification.json``."""


@dataclass(frozen=True)
class _Verified(Verification):
    """The content of ``verification.json``."""

    digests: dict[str, str]


def verify_run(run: Run, only: str | None = None) -> dict[str, Verification]:
    """Reload every exported file from disk, and compare it to the trained model on the test split.

    Args:
        run: A run with exported files.
        only: The name of the only format to verify. By default, all formats of the run are verified.

    Returns:
        One verification per file, by name. Each is also written to
        ``export/STAGE/FORMAT/verification.json`` with the digests of the compared files.

    Raises:
        QatkitError: a stage has not been exported, or a file would be written outside the run's folder.
    """
    run.check_writes()
    run.check_recipe()
    exports, data = exports_of(run, only), held_out_data(run)
    return {exported.name: _verify_file(run, exported, data) for exported in exports}


def _verify_file(run: Run, exported: Exported, data: LightningDataModule) -> Verification:
    path, row = exported.path, exported.format
    if not path.exists():
        raise QatkitError("there is no such file or folder", key=str(path), advice=f"run `qatkit export {run.out}`")
    if (changed := _changed_export(run, exported)) is not None:
        problem = f"{changed}: the file changed after it was verified; it is verified again"
        warnings.warn(problem, QatkitWarning, stacklevel=2)
    digests = _digests(run, exported)
    model, tokenizer = run.load_model(exported.stage).eval(), getattr(data, "tokenizer", None)
    verification = verify(model, path, data.test_dataloader(), row.name, task=declared_task(data))
    verification = with_companions(verification, row, model, path, tokenizer, first_batch(data))
    content = asdict(verification) | {"digests": digests}
    write_signed(exported.folder / VERDICT, content, SCHEMA, partial(json.dumps, indent=1))
    return verification


def _changed_export(run: Run, exported: Exported) -> Path | None:
    """The first file that differs from the one that was verified last; None if there is none."""
    try:
        content = read_signed(exported.folder / VERDICT, _Verified, SCHEMA, "")
    except QatkitError:  # a corrupt record is replaced
        return None
    return None if content is None else changed_file(content["digests"], run.out)


def read_verification(run: Run, exported: Exported) -> dict[str, Any]:
    """Read the verification of an export.

    Raises:
        QatkitError: the file has not been verified, its record is corrupt, or one of the compared files has changed
            since.
    """
    verify_again = f"`qatkit verify {run.out}`"
    path = exported.folder / VERDICT
    content = read_signed(path, _Verified, SCHEMA, f"run {verify_again}")
    if content is None:
        raise QatkitError(f"'{exported.name}' has not been verified", advice=f"run {verify_again}")
    digests = content.pop("digests")
    if (changed := changed_file(digests, run.out)) is not None:
        raise QatkitError(
            "the file has changed since verification",
            key=str(changed),
            advice=f"run `qatkit export {run.out}`, then {verify_again}",
        )
    return content


def _digests(run: Run, exported: Exported) -> dict[str, str]:
    """Digests of an export and of the stage's weights, by path in the run folder."""
    files = [path for path in exported.folder.rglob("*") if path.is_file() and path.name != VERDICT]
    stage = run.folder(exported.stage)
    return file_digests([*files, *stage.glob("*.safetensors"), *stage.glob("model/*.safetensors")], run.out)
