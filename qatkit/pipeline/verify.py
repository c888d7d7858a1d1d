"""The verify step, which compares every exported file to the stage from which it was exported."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qatkit.common.digests import changed_file, file_digests
from qatkit.common.records import read_signed, write_signed
from qatkit.errors import QatkitError, QatkitWarning
from qatkit.export.companions import compare_companions
from qatkit.export.verification import Verification, verify
from qatkit.pipeline.export import VERDICT, exported_path, first_batch, format_of, held_out_data
from qatkit.run.folder import Run
from qatkit.tasks import declared_task

_RECORDS = (VERDICT, "evaluation.json")
"""Files in a stage's export folder that are not part of the export."""
SCHEMA = 1
"""Version of ``verification.json``."""


@dataclass(frozen=True)
class _Verified(Verification):
    """The content of ``verification.json``."""

    digests: dict[str, str]


def verify_run(run: Run) -> dict[str, Verification]:
    """Reload every exported file from disk, and compare it to the trained model on the test split.

    Returns:
        One verification per stage, also written to ``export/STAGE/verification.json`` with the digests of the compared
        files.

    Raises:
        QatkitError: a stage has not been exported, or a file would be written outside the run's folder.
    """
    run.check_writes()
    run.check_recipe()
    row, data = format_of(run), held_out_data(run)
    tokenizer = getattr(data, "tokenizer", None)
    verifications = {}
    for stage in run.rows:
        path, folder = exported_path(run, stage), run.out / "export" / stage
        if not path.exists():
            raise QatkitError("there is no such file or folder", key=str(path), advice=f"run `qatkit export {run.out}`")
        if (changed := _changed_export(run, stage)) is not None:
            problem = f"{changed}: the file changed after it was verified; it is verified again"
            warnings.warn(problem, QatkitWarning, stacklevel=2)
        digests = _digests(run, stage)
        model = run.load_model(stage).eval()
        verification = verify(model, path, data.test_dataloader(), row.name, task=declared_task(data))
        failures = compare_companions(row.companions, model, tokenizer, folder)
        if row.compare_data:
            failures += row.call("compare_data", path, tokenizer, first_batch(data))
        verification = verification.with_failures(failures)
        content = asdict(verification) | {"digests": digests}
        write_signed(folder / VERDICT, content, SCHEMA, partial(json.dumps, indent=1))
        verifications[stage] = verification
    return verifications


def _changed_export(run: Run, stage: str) -> Path | None:
    """The first file of a stage that differs from the one that was verified last; None if there is none."""
    try:
        content = read_signed(run.out / "export" / stage / VERDICT, _Verified, SCHEMA, "")
    except QatkitError:  # a corrupt record is replaced
        return None
    return None if content is None else changed_file(content["digests"], run.out)


def read_verification(run: Run, stage: str) -> dict[str, Any]:
    """Read the verification of a stage's export.

    Raises:
        QatkitError: the stage has not been verified, its record is corrupt, or one of the compared files has changed
            since.
    """
    verify_again = f"`qatkit verify {run.out}`"
    path = run.out / "export" / stage / VERDICT
    content = read_signed(path, _Verified, SCHEMA, f"run {verify_again}")
    if content is None:
        raise QatkitError(f"stage '{stage}' has not been verified", advice=f"run {verify_again}")
    digests = content.pop("digests")
    if (changed := changed_file(digests, run.out)) is not None:
        raise QatkitError(
            "the file has changed since verification",
            key=str(changed),
            advice=f"run `qatkit export {run.out}`, then {verify_again}",
        )
    return content


def _digests(run: Run, stage: str) -> dict[str, str]:
    """Digests of a stage's exported files and of its weights, by path in the run folder."""
    exported = [path for path in (run.out / "export" / stage).rglob("*") if path.is_file()]
    weights = [*run.folder(stage).glob("*.safetensors"), *run.folder(stage).glob("model/*.safetensors")]
    return file_digests([*(path for path in exported if path.name not in _RECORDS), *weights], run.out)
