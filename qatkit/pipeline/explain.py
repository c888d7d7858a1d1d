"""Walk through every exported file of a run layer by layer, to find the first output that differs."""

from __future__ import annotations

from qatkit.export.explanation import Explanation, explain
from qatkit.pipeline.export import held_out_data
from qatkit.run.exports import exports_of
from qatkit.run.folder import Run


def explain_run(run: Run) -> dict[str, Explanation]:
    """Compare every exported file to the stage from which it was exported, layer by layer on the test split.

    Returns:
        One explanation per file, by name. Files that cannot be walked have one that says so.

    Raises:
        QatkitError: a stage has not been exported, or a package of a format is missing.
    """
    data = held_out_data(run)
    return {
        exported.name: explain(
            run.load_model(exported.stage).eval(), exported.path, data.test_dataloader(), exported.format.name
        )
        for exported in exports_of(run)
    }
