"""The report step, which measures the exported files and writes the report of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qatkit.common.files import write_atomically
from qatkit.pipeline.baselines import Baselines, example_of, make_baselines, measure_baselines
from qatkit.pipeline.bench import read_decoding
from qatkit.pipeline.evaluation import evaluate_run
from qatkit.pipeline.export import first_batch, held_out_data
from qatkit.pipeline.tracking import Tracking
from qatkit.pipeline.verify import read_verification
from qatkit.report.bench import Example, File, Latency, compare_files, side_by_side
from qatkit.report.content import Measurements, report_content, write_report
from qatkit.report.tables import markdown
from qatkit.run.exports import Exported, exports_of
from qatkit.run.folder import Run
from qatkit.tasks import call, one_sample


def report_run(run: Run) -> dict[str, Any]:
    """Measure the exported files in one process, and write ``report.json`` and ``report.md``.

    Returns:
        The content of ``report.json``.

    Raises:
        QatkitError: a stage has not been verified, its export or its weights have changed since, or a file would be
            written outside the run's folder.
    """
    run.check_writes()
    run.check_recipe()
    exports, data = exports_of(run), held_out_data(run)
    main = exports[0].format
    verifications = {exported.name: read_verification(run, exported) for exported in exports}
    paths = {exported.stage: exported.path for exported in exports if exported.format is main}
    quantized = any(run.record(stage).layers for stage in run.rows)
    with tempfile.TemporaryDirectory() as folder:
        made = make_baselines(run, main, data, paths, Path(folder)) if quantized else Baselines(None, {})
        latency = _latencies(exports, made, example_of(first_batch(data)))
        baselines = measure_baselines(made, main, data, latency)
    measured = Measurements(
        verification=verifications,
        latency=latency,
        baselines=baselines,
        cost=_torch_latencies(run),
        language=evaluate_run(run, data) if run.recipe.evaluate else {},
        decoding=read_decoding(run, exports),
    )
    content = report_content(run, exports, measured)
    write_report(run.out, content)
    write_atomically(run.out / "report.md", markdown(content))
    return content


def track_run(run: Run, content: dict[str, Any], tracking: Tracking) -> None:
    """Send the report and the exported files to the recipe's tracker, if it has one, and close the tracker."""
    pages = [run.out / name for name in ("report.html", "report.md", "report.json")]
    models = {exported.name: exported.path for exported in exports_of(run)}
    tracking.log_report(content, [page for page in pages if page.exists()], models)


def _latencies(exports: Sequence[Exported], made: Baselines, example: Example) -> dict[str, list[Latency]]:
    """Latencies of all files whose format has a benchmark, in alternation, by name."""
    files = {
        exported.name: File(exported.path, example, exported.format.name)
        for exported in exports
        if exported.format.benchmark
    }
    files |= {name: File(path, example, exports[0].format.name) for name, path in made.files.items()}
    return compare_files(files) if files else {}


def _torch_latencies(run: Run) -> dict[str, dict[str, float]]:
    """Latency of one sample in plain PyTorch, if the stages have different models."""
    if all(run.record(stage).architecture is None for stage in run.rows):
        return {}
    batch = one_sample(first_batch(held_out_data(run)))
    models = {stage: run.load_model(stage, quantizers=False).eval() for stage in run.rows}
    with torch.inference_mode():
        times = side_by_side({stage: partial(call, model, batch) for stage, model in models.items()})
    return {
        stage: {"torch_ms": median * 1e3, "torch_low_ms": low * 1e3, "torch_high_ms": high * 1e3}
        for stage, (low, median, high) in times.items()
    }
