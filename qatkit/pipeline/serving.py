"""The bench step, which measures a run's exported files beside the runtime's own quantization."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from qatkit.errors import QatkitError
from qatkit.export.runtime import Kernels
from qatkit.pipeline.export import exported_path, first_batch, format_of, held_out_data
from qatkit.pipeline.report import example_of
from qatkit.quantization.coverage import coverage
from qatkit.quantization.prepare import qat_weights
from qatkit.report.serving import Served, serve
from qatkit.run.folder import Run

CALIBRATION_BATCHES = 16


@dataclass(frozen=True)
class Bench:
    """The measured files of a run."""

    served: dict[str, Served]
    """By stage, and by the name of the function that quantized without training."""
    dense: str | None
    """The stage in floating point; None if the comparison has none."""
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
            f"the latency of '{row.name}' exports is not measured", key="export.format", advice="use format: onnx"
        )
    paths = {stage: exported_path(run, stage) for stage in run.rows}
    for path in paths.values():
        if not path.exists():
            raise QatkitError("there is no such file", key=str(path), advice=f"run `qatkit export {run.out}`")
    models = {stage: run.load_model(stage) for stage in paths}
    dense = next((stage for stage, model in models.items() if not qat_weights(model)), None)
    last = list(paths)[-1]
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, Path] = {}
        if against:
            if not row.baselines:
                raise QatkitError(
                    f"{row.runtime} has no quantization of its own", key="--against", advice="omit --against"
                )
            if dense is None:
                raise QatkitError(
                    "no stage in the comparison is in floating point, so there is nothing to quantize without training",
                    key="--against",
                    advice="omit --against, or add a stage without quantize to the recipe",
                )
            data.setup("fit")
            batches = [example_of(batch) for batch in islice(data.train_dataloader(), CALIBRATION_BATCHES)]
            made = row.call("baselines", paths[dense], batches, Path(folder))
        files = paths | made
        served = serve(files, example_of(first_batch(data)), batch_sizes, threads, row.name)
        kernels = {name: row.call("kernels", path) for name, path in files.items()}
    return Bench(served, dense, list(made), last, kernels, str(coverage(models[last])))
