"""The latency of a run's exported files, beside the runtime's own post-training quantization."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qatkit.errors import QatkitError
from qatkit.export.onnx.runtime import Kernels
from qatkit.pipeline.baselines import example_of, make_baselines
from qatkit.pipeline.export import first_batch, held_out_data
from qatkit.quantization.coverage import coverage
from qatkit.report.bench import File
from qatkit.report.serving import Served, serve
from qatkit.run.exports import Exported
from qatkit.run.folder import Run


@dataclass(frozen=True)
class Bench:
    """The measured files of a run."""

    served: dict[str, Served]
    """Measurements by export or, for a file that the runtime quantized, by the name of its function."""
    dense: str | None
    """The floating-point stage; None if the comparison has none."""
    baselines: list[str]
    """Names of the files that were quantized without training."""
    last: str
    """The last stage, in the first of the measured formats."""
    kernels: dict[str, Kernels]
    """The kernels of every file."""
    coverage: str
    """The layers of the last stage that are quantized, and those that are not."""


def bench_run(run: Run, exports: Sequence[Exported], batch_sizes: Sequence[int], threads: int, against: bool) -> Bench:
    """Measure the latency of exported files.

    Args:
        run: The run.
        exports: Its exports whose latency is measured, at least one.
        batch_sizes: Batch sizes to measure.
        threads: Number of threads that the runtime uses.
        against: Also measure the runtime's own quantization of the floating-point file.

    Raises:
        QatkitError: there is nothing to quantize without training.
    """
    row, data = exports[0].format, held_out_data(run)
    paths = {exported.stage: exported.path for exported in exports if exported.format is row}
    names = {exported.stage: exported.name for exported in exports if exported.format is row}
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
        example = example_of(first_batch(data))
        files = {exported.name: File(exported.path, example, exported.format.name) for exported in exports}
        files |= {name: File(path, example, row.name) for name, path in made.files.items()}
        served = serve(files, batch_sizes, threads)
        kernels = {name: file.row.call("kernels", file.path) for name, file in files.items()}
    dense = None if made.dense is None else names[made.dense]
    return Bench(served, dense, list(made.files), names[last], kernels, str(coverage(run.load_model(last))))
