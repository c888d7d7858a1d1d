"""The report step: the exported files, measured and compared."""

from __future__ import annotations

import json
import os
import platform
import re
import warnings
from dataclasses import asdict
from datetime import datetime
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from qatkit.common.files import write_atomically
from qatkit.errors import QatkitError, QatkitWarning
from qatkit.export.runtime import integer_kernels
from qatkit.export.sparse import dense_bytes
from qatkit.pipeline.evaluation import evaluate_run
from qatkit.pipeline.export import example_of, exported_bytes, exported_path, format_of, held_out_data
from qatkit.pipeline.tracking import Tracking
from qatkit.pipeline.verify import verification_path
from qatkit.quantization.folding import fold_batchnorm
from qatkit.quantization.prepare import prepare_qat
from qatkit.report.bench import compare, side_by_side
from qatkit.report.curves import read_curves
from qatkit.report.histograms import weight_histograms
from qatkit.report.tables import markdown
from qatkit.run.folder import Run
from qatkit.run.stage_files import measured_zeros
from qatkit.tasks import call, one_sample

RUNTIMES = {"onnx": ["onnx", "onnxruntime"], "compressed_tensors": ["transformers", "compressed_tensors"]}


def report_run(run: Run) -> dict[str, Any]:
    """Measure the exported files in one process and write ``report.json`` and ``report.md``."""
    paths = {stage: exported_path(run, stage) for stage in run.rows}
    latencies = compare(paths, example_of(held_out_data(run))) if format_of(run) == "onnx" else {}
    scores = evaluate_run(run, held_out_data(run)) if run.recipe.evaluate else {}
    costs = _latencies(run)
    rows = []
    for stage, path in paths.items():
        record = run.record(stage)
        verification = verification_path(run, stage)
        if not verification.exists():
            raise QatkitError(f"'{stage}' was not verified; run `qatkit verify {run.out}` first")
        config = run.recipe.stages[stage]
        rows.append(
            {
                "stage": stage,
                "kind": "dense" if stage in run.uncompressed else "trained" if config.max_steps else "post-training",
                "adapters": config.lora.title if config.lora is not None and config.max_steps else "",
                **{
                    f"test_{name.removeprefix('test/')}": value
                    for name, value in record.metrics.items()
                    if name.startswith("test/")
                },
                "bytes": exported_bytes(path),
                "dense_bytes": dense_bytes(path) if format_of(run) == "sparse" else None,
                "cost": record.cost | costs.get(stage, {}),
                "latency": latencies.get(stage, []),
                "kernels": asdict(integer_kernels(path)) if format_of(run) == "onnx" else None,
                "verification": json.loads(verification.read_text()),
                "language": scores.get(stage),
                "layers": record.layers,
                "zeros": measured_zeros(run.folder(stage)),
                "histograms": _histograms(run, stage),
                "seconds": record.seconds,
            }
        )
    content = {
        "name": run.recipe.name,
        "format": format_of(run),
        "written": datetime.now().astimezone().isoformat(" ", "minutes"),
        "rows": rows,
        "stages": [_training(run, stage) for stage in run.recipe.stages],
        "recipe": (run.out / "recipe.yaml").read_text(encoding="utf-8"),
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {
            name: version(name)
            for name in ("qatkit", "torch", "lightning", *RUNTIMES.get(format_of(run), []))
            if _installed(name)
        }
        | {"python": platform.python_version()},
    }
    write_atomically(run.out / "report.json", _json(content))
    write_atomically(run.out / "report.md", markdown(content))
    return content


def track_run(run: Run, content: dict[str, Any], tracking: Tracking) -> None:
    """Send the report and the exported files to the recipe's tracker, where it has one, and close it."""
    pages = [run.out / name for name in ("report.html", "report.md", "report.json")]
    models = {row["stage"]: exported_path(run, row["stage"]) for row in content["rows"]}
    tracking.log_report(content, [page for page in pages if page.exists()], models)


def _latencies(run: Run) -> dict[str, dict[str, float]]:
    """How long plain torch takes for one sample, where the stages do not all have the same model."""
    if all(run.record(stage).architecture is None for stage in run.rows):
        return {}
    batch = one_sample(next(iter(held_out_data(run).test_dataloader())))
    models = {stage: run.load_model(stage, quantizers=False).eval() for stage in run.rows}
    with torch.inference_mode():
        times = side_by_side({stage: partial(call, model, batch) for stage, model in models.items()})
    return {
        stage: {"torch_ms": median * 1e3, "torch_low_ms": low * 1e3, "torch_high_ms": high * 1e3}
        for stage, (low, median, high) in times.items()
    }


def _training(run: Run, stage: str) -> dict[str, Any]:
    record = run.record(stage)
    return {
        "stage": stage,
        "steps": (record.early_stopping or {}).get("steps", run.recipe.stages[stage].max_steps),
        "seconds": record.seconds,
        "metrics": record.metrics,
        "curves": read_curves(run.folder(stage) / "logs"),
    }


def _histograms(run: Run, stage: str) -> dict[str, dict[str, Any]]:
    """Weights on their grids by layer, before the stage's first step (None where it has no step) and after its last."""
    config = run.recipe.stages[stage]
    after = weight_histograms(run.load_model(stage))
    same = config.shrink is None  # a shrunk model begins with other weights than the stage before left
    before = weight_histograms(_start_of(run, stage)) if after and config.max_steps and same else {}
    return {name: {"before": before.get(name), "after": histogram} for name, histogram in after.items()}


def _start_of(run: Run, stage: str) -> nn.Module:
    """The fake-quantized model as the stage's first step met it."""
    model = run.start_model(stage)
    config = run.recipe.stages[stage].quantize
    assert config is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QatkitWarning)  # training said it already
        fold_batchnorm(model)
        prepare_qat(model, **config.arguments)
    return model


def _json(content: dict[str, Any]) -> str:
    """Indented, but with every list of plain numbers on one line."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[\n\s*(-?\d[^\[\]{}\"]*?)\n\s*\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None
