"""From finished stages to files that are verified, measured and compared."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from qatkit.analysis.bench import compare
from qatkit.analysis.report import markdown
from qatkit.checkpoint import write_atomically
from qatkit.errors import QatkitError
from qatkit.export.dense import export_dense
from qatkit.export.onnx import export_onnx
from qatkit.export.verify import Verification, verify
from qatkit.pipeline import Run

SUFFIXES = {"onnx": "onnx", "dense": "safetensors"}


def exported_path(run: Run, stage: str) -> Path:
    """Where the exported file of a stage is."""
    return run.out / "export" / stage / f"model.{SUFFIXES[_format(run)]}"


def export_run(run: Run) -> list[Path]:
    """Export every stage that the comparison shows, in the format of the recipe.

    Raises:
        QatkitError: a stage is not finished, or the format cannot hold what the recipe trained.
    """
    example = _example(_data(run))
    paths = []
    for stage in run.rows:
        run.record(stage)
        path = exported_path(run, stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        model = run.load_model(stage).eval()
        if _format(run) == "onnx":
            export_onnx(model, example, path)
        else:
            export_dense(model, path)
        paths.append(path)
    return paths


def verify_run(run: Run) -> dict[str, Verification]:
    """Reload every exported file from disk and compare it with what training left, on the test split.

    Returns:
        One verification per stage, also written to ``export/STAGE/verification.json``.
    """
    data = _data(run)
    checked = {}
    for stage in run.rows:
        path = exported_path(run, stage)
        if not path.exists():
            raise QatkitError(f"{path} does not exist; run `qatkit export {run.out}` first")
        model = run.load_model(stage).eval()
        checked[stage] = verify(model, path, data.test_dataloader())
        write_atomically(path.parent / "verification.json", json.dumps(asdict(checked[stage]), indent=1))
    return checked


def report_run(run: Run) -> dict[str, Any]:
    """Measure the exported files in one process and write ``report.json`` and ``report.md``."""
    paths = {stage: exported_path(run, stage) for stage in run.rows}
    example = _example(_data(run))
    latencies = compare(paths, example) if _format(run) == "onnx" else {}
    rows = []
    for stage, path in paths.items():
        record = run.record(stage)
        verification = path.parent / "verification.json"
        if not verification.exists():
            raise QatkitError(f"'{stage}' was not verified; run `qatkit verify {run.out}` first")
        config = run.recipe.stages[stage]
        rows.append(
            {
                "stage": stage,
                "kind": "dense" if not config.compresses else "trained" if config.max_steps else "post-training",
                "test_accuracy": record.metrics["test/accuracy"],
                "bytes": path.stat().st_size,
                "latency": latencies.get(stage, []),
                "verification": json.loads(verification.read_text()),
                "layers": record.layers,
                "seconds": record.seconds,
            }
        )
    content = {
        "name": run.recipe.name,
        "format": _format(run),
        "rows": rows,
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {
            name: version(name) for name in ("qatkit", "torch", "lightning", "onnxruntime") if _installed(name)
        },
    }
    write_atomically(run.out / "report.json", json.dumps(content, indent=1))
    write_atomically(run.out / "report.md", markdown(content))
    return content


def _format(run: Run) -> str:
    if run.recipe.export is None:
        raise QatkitError("export: the recipe has no such block; write export: {format: onnx}")
    return run.recipe.export.format


def _data(run: Run) -> LightningDataModule:
    data = run.build_data(batch_size=64)
    data.prepare_data()
    data.setup("test")
    return data


def _example(data: LightningDataModule) -> Tensor:
    inputs: Tensor = next(iter(data.test_dataloader()))[0]
    return inputs


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None
