"""Measure the exported files of several runs in one process, so that their latencies are comparable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qatkit.errors import QatkitError
from qatkit.pipeline.baselines import example_of
from qatkit.pipeline.export import first_batch, held_out_data
from qatkit.pipeline.verify import read_verification
from qatkit.report.bench import File, compare_files
from qatkit.report.content import read_report
from qatkit.run.exports import exports_of
from qatkit.run.folder import Run


def joint_reports(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the reports of runs, with the latencies of all stages measured alternately in one process.

    Files quantized by a runtime itself are omitted, because they are not kept.

    Args:
        runs: Runs with reports.

    Raises:
        QatkitError: a run has no report; its exported files are missing, have changed since verification, or all have
            formats whose latency is not measured.
    """
    reports = [read_report(run.out) for run in runs]
    files: dict[str, File] = {}
    for index, run in enumerate(runs):
        exports = exports_of(run)
        measured_ones = [exported for exported in exports if exported.format.benchmark]
        if not measured_ones:
            names = " and ".join(dict.fromkeys(f"'{exported.format.name}'" for exported in exports))
            raise QatkitError(f"the latency of {names} exports is not measured", key=str(run.out))
        for exported in exports:
            read_verification(run, exported)
        example = example_of(first_batch(held_out_data(run)))
        for exported in measured_ones:
            files[f"{index}/{exported.name}"] = File(exported.path, example, exported.format.name)
    measured = compare_files(files)
    return [
        {
            **report,
            "baselines": [],
            **{
                key: [{**row, "latency": measured.get(f"{index}/{row['file']}", [])} for row in report[key]]
                for key in ("rows", "others")
            },
        }
        for index, report in enumerate(reports)
    ]
