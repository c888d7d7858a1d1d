"""The verify step: every exported file against the stage that it was made from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from qatkit.common.files import write_atomically
from qatkit.errors import QatkitError
from qatkit.export.verify import Verification, verify
from qatkit.pipeline.export import exported_path, held_out_data
from qatkit.run.folder import Run
from qatkit.tasks import declared_task


def verify_run(run: Run) -> dict[str, Verification]:
    """Reload every exported file from disk and compare it with what training left, on the test split.

    Returns:
        One verification per stage, also written to ``export/STAGE/verification.json``.
    """
    data = held_out_data(run)
    checked = {}
    for stage in run.rows:
        path = exported_path(run, stage)
        if not path.exists():
            raise QatkitError(f"{path} does not exist; run `qatkit export {run.out}` first")
        model = run.load_model(stage).eval()
        checked[stage] = verify(model, path, data.test_dataloader(), task=declared_task(data))
        write_atomically(verification_path(run, stage), json.dumps(asdict(checked[stage]), indent=1))
    return checked


def verification_path(run: Run, stage: str) -> Path:
    return run.out / "export" / stage / "verification.json"
