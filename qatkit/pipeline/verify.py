"""The verify step: compare every exported file with the stage it was made from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from qatkit.common.files import write_atomically
from qatkit.errors import QatkitError
from qatkit.export.verification import Verification, verify
from qatkit.pipeline.export import exported_path, format_of, held_out_data
from qatkit.run.folder import Run
from qatkit.tasks import declared_task


def verify_run(run: Run) -> dict[str, Verification]:
    """Reload every exported file from disk and compare it with the trained model, on the test split.

    Returns:
        One verification per stage, also written to ``export/STAGE/verification.json``.

    Raises:
        QatkitError: a stage was not exported.
    """
    row, data = format_of(run), held_out_data(run)
    verifications = {}
    for stage in run.rows:
        path = exported_path(run, stage)
        if not path.exists():
            raise QatkitError("there is no such file or folder", key=str(path), advice=f"run `qatkit export {run.out}`")
        model = run.load_model(stage).eval()
        verifications[stage] = verify(model, path, data.test_dataloader(), row.name, task=declared_task(data))
        write_atomically(verification_path(run, stage), json.dumps(asdict(verifications[stage]), indent=1))
    return verifications


def verification_path(run: Run, stage: str) -> Path:
    """The file with the verification of a stage's export."""
    return run.out / "export" / stage / "verification.json"
