"""The report step, which measures the exported files and writes the report of a run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from qatkit.common.files import write_atomically
from qatkit.pipeline.evaluation import evaluate_run
from qatkit.pipeline.export import exported_path, first_batch, format_of, held_out_data
from qatkit.pipeline.tracking import Tracking
from qatkit.pipeline.verify import read_verification
from qatkit.report.bench import Example, compare, side_by_side
from qatkit.report.content import Measurements, report_content, write_report
from qatkit.report.tables import markdown
from qatkit.run.folder import Run
from qatkit.tasks import call, model_inputs, one_sample


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
    row, data = format_of(run), held_out_data(run)
    paths = {stage: exported_path(run, stage) for stage in run.rows}
    verifications = {stage: read_verification(run, stage) for stage in run.rows}
    measured = Measurements(
        verification=verifications,
        latency=compare(paths, example_of(first_batch(data)), format=row.name) if row.benchmark else {},
        cost=_torch_latencies(run),
        language=evaluate_run(run, data) if run.recipe.evaluate else {},
    )
    content = report_content(run, row, measured)
    write_report(run.out, content)
    write_atomically(run.out / "report.md", markdown(content))
    return content


def example_of(batch: Any) -> Example:
    """Return the inputs of a batch: the first positional one, or all by name."""
    args, tensors = model_inputs(batch)
    return args[0] if args else {name: tensor for name, tensor in tensors.items() if tensor is not None}


def track_run(run: Run, content: dict[str, Any], tracking: Tracking) -> None:
    """Send the report and the exported files to the recipe's tracker, if it has one, and close the tracker."""
    pages = [run.out / name for name in ("report.html", "report.md", "report.json")]
    models = {row["stage"]: exported_path(run, row["stage"]) for row in content["rows"]}
    tracking.log_report(content, [page for page in pages if page.exists()], models)


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
