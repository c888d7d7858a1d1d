"""The bench step, which compares a run's exported files with the runtime's own post-training quantization."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qatkit.errors import QatkitError
from qatkit.export.runtime import Kernels
from qatkit.pipeline.baselines import example_of, make_baselines
from qatkit.pipeline.export import exported_path, first_batch, format_of, held_out_data
from qatkit.quantization.coverage import coverage
from qatkit.report.serving import Served, serve
from qatkit.run.folder import Run


@dataclass(frozen=True)
class Bench:
    """The measured files of a run."""

    served: dict[str, Served]
    """Measurements by stage or, for a file that the runtime quantized, by the name of its function."""
    dense: str | None
    """The floating-point stage; None if the comparison has none."""
    baselines: list[str]
    """Names of the files that were quantized without training."""
    last: str
    """The last stage."""
    kernels: dict[str, Kernels]
    """The kernels of every file."""
    coverage: str
    """The layers of the last stage that are quantized, and those that are not."""


def bench_run(run: Run, batch_sizes: Sequence[int], threads: int, against: bool) -> Bench:
    """Measure every exported file of a run.

    Args:
        run: A run with exported files.
        batch_sizes: Batch sizes to measure.
        threads: Threads of the runtime.
        against: Also measure the runtime's own quantization of the floating-point file.

    Raises:
        QatkitError: the format's latency is not measured, a file is missing, or there is nothing to quantize without
            training.
    """
    run.check_recipe()
    row, data = format_of(run), held_out_data(run)
    if not row.benchmark:
        raise QatkitError(
            f"the latency of '{row.name}' exports is not measured",
            key="export.format",
            advice="use format: onnx or openvino",
        )
    paths = {stage: exported_path(run, stage) for stage in run.rows}
    for path in paths.values():
        if not path.exists():
            raise QatkitError("there is no such file", key=str(path), advice=f"run `qatkit export {run.out}`")
    last = list(paths)[-1]
    if against and not row.baselines:
        raise QatkitError(
            f"'{row.name}' files have no baseline to compare with", key="--against", advice="omit --against"
        )
    with tempfile.TemporaryDirectory() as folder:
        made = make_baselines(run, row if against else replace(row, baselines=""), data, paths, Path(folder))
        if against and made.failure:
            raise QatkitError(made.failure, key=str(paths[made.dense or last]), advice="omit --against")
        if against and made.dense is None:
            raise QatkitError(
                "no stage in the comparison is in floating point, so there is nothing to quantize without training",
                key="--against",
                advice="omit --against, or add a stage without quantize to the recipe",
            )
        files = {**paths, **made.files}
        served = serve(files, example_of(first_batch(data)), batch_sizes, threads, row.name)
        kernels = {name: row.call("kernels", path) for name, path in files.items()}
    return Bench(served, made.dense, list(made.files), last, kernels, str(coverage(run.load_model(last))))
