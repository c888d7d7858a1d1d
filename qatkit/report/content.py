"""Assemble, write and read ``report.json``."""

from __future__ import annotations

import json
import os
import platform
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from qatkit.common.records import read_signed, write_signed
from qatkit.errors import QatkitError, QatkitWarning
from qatkit.quantization.folding import fold_batchnorm
from qatkit.quantization.prepare import prepare_qat
from qatkit.report.curves import read_curves
from qatkit.report.histograms import weight_histograms
from qatkit.run.exports import Exported
from qatkit.run.folder import Run
from qatkit.run.stage_files import check_logs, measured_zeros

SCHEMA = 2
"""Schema version of ``report.json``; incremented when the meaning of a key changes or a key is removed."""


class _Report(TypedDict):
    """The content of ``report.json``, without its schema version and digest."""

    name: str
    format: str
    written: str
    rows: list[dict[str, Any]]
    others: list[dict[str, Any]]
    baselines: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    recipe: str
    machine: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class Measurements:
    """Measured values of a report."""

    verification: Mapping[str, dict[str, Any]]
    """The fields of a `Verification`, by the name of the export."""
    latency: Mapping[str, list[Any]] = field(default_factory=dict)
    """Latency of an exported file in its runtime by name, one entry per batch size; empty if it is not measured."""
    cost: Mapping[str, dict[str, float]] = field(default_factory=dict)
    """Latency of the plain model in PyTorch by stage, if the stages have different models."""
    language: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Results of the ``evaluate`` block by stage."""
    baselines: Sequence[dict[str, Any]] = ()
    """Results of the runtime's own post-training quantization."""
    decoding: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """What `qatkit bench` measured of language models, by the name of the export."""


def report_content(run: Run, exports: Sequence[Exported], measured: Measurements) -> dict[str, Any]:
    """Assemble the report of a run.

    Args:
        run: The run, with all stages finished and exported.
        exports: All exports, those in the main format first.
        measured: Measured values.
    """
    formats = list({exported.format.name: exported.format for exported in exports}.values())
    main = [exported for exported in exports if exported.format is formats[0]]
    machine = {"cpus": os.cpu_count(), "processor": platform.machine(), "threads": torch.get_num_threads()}
    versions = {name: version(name) for name in ("qatkit", "torch", "lightning")}
    packages = {name: number for row in formats for name, number in row.versions().items()}
    return {
        "schema": SCHEMA,
        "name": run.recipe.name,
        "format": formats[0].name,
        "written": datetime.now().astimezone().isoformat(" ", "minutes"),
        "rows": [
            stage_row(run, exported, measured) | {"histograms": _histograms(run, exported.stage)} for exported in main
        ],
        "others": [_file(run, exported, measured) for exported in exports if exported not in main],
        "baselines": list(measured.baselines),
        "stages": [_training(run, stage) for stage in run.recipe.stages],
        "recipe": (run.out / "recipe.yaml").read_text(encoding="utf-8"),
        "machine": machine,
        "versions": versions | packages | {"python": platform.python_version()},
    }


def write_report(folder: Path, content: dict[str, Any]) -> None:
    """Write ``report.json`` to a run folder, indented, with each list of numbers on one line."""
    write_signed(folder / "report.json", content, SCHEMA, _text)


def read_report(folder: Path) -> dict[str, Any]:
    """Read the ``report.json`` of a run folder.

    Raises:
        QatkitError: the report does not exist, is corrupted, or was written by an incompatible version of qatkit.
    """
    path = folder / "report.json"
    command = f"run `qatkit report {folder}`"
    content = read_signed(path, _Report, SCHEMA, f"{command} to rewrite it")
    if content is None:
        raise QatkitError("the file does not exist", key=str(path), advice=f"{command} first")
    return {"schema": SCHEMA} | content


def _text(content: Any) -> str:
    text = json.dumps(content, indent=1)
    return re.sub(r"\[\n\s*(-?\d[^\[\]{}\"]*?)\n\s*\]", lambda match: f"[{' '.join(match[1].split())}]", text)


def stage_row(run: Run, exported: Exported, measured: Measurements) -> dict[str, Any]:
    """Return a row of the comparison: an exported file, and what is known of its model.

    Args:
        run: The run; the stage is finished.
        exported: The file.
        measured: Measured values.
    """
    stage = exported.stage
    record = run.record(stage)
    return _file(run, exported, measured) | {
        "cost": record.cost | measured.cost.get(stage, {}),
        "language": measured.language.get(stage),
        "zeros": measured_zeros(run.folder(stage)),
        "seconds": record.seconds,
    }


def _file(run: Run, exported: Exported, measured: Measurements) -> dict[str, Any]:
    """One exported file with its size, metrics, latency and verification."""
    stage, row, path = exported.stage, exported.format, exported.path
    record, config = run.record(stage), run.recipe.stages[stage]
    metrics = {key: value for key, value in record.metrics.items() if key.startswith("test/")}
    return {
        "file": exported.name,
        "stage": stage,
        "format": row.name,
        "kind": "dense" if stage in run.uncompressed else "trained" if config.max_steps else "post-training",
        "adapters": config.lora.title if config.lora is not None and config.max_steps else "",
        **{f"test_{key.removeprefix('test/')}": value for key, value in metrics.items()},
        "bytes": exported.bytes,
        "dense_bytes": row.call("dense_bytes", path) if row.dense_bytes else None,
        "latency": measured.latency.get(exported.name, []),
        "decoding": measured.decoding.get(exported.name),
        "kernels": asdict(row.call("kernels", path)) if row.kernels else None,
        "verification": measured.verification[exported.name],
        "layers": record.layers,
    }


def _training(run: Run, stage: str) -> dict[str, Any]:
    record = run.record(stage)
    check_logs(run.folder(stage), record)
    return {
        "stage": stage,
        "steps": record.early_stopping["steps"] if record.early_stopping else run.recipe.stages[stage].max_steps,
        "seconds": record.seconds,
        "metrics": record.metrics,
        "curves": read_curves(run.folder(stage) / "logs"),
    }


def _histograms(run: Run, stage: str) -> dict[str, dict[str, Any]]:
    """Weight histograms by layer, before the stage's first step (None if it has no steps) and after its last."""
    config = run.recipe.stages[stage]
    after = weight_histograms(run.load_model(stage))
    comparable = config.shrink is None  # a shrunk model starts with weights that differ from those of the parent stage
    before = weight_histograms(_first_step_model(run, stage)) if after and config.max_steps and comparable else {}
    return {name: {"before": before.get(name), "after": histogram} for name, histogram in after.items()}


def _first_step_model(run: Run, stage: str) -> nn.Module:
    """The fake-quantized model at the stage's first step."""
    model = run.start_model(stage)
    config = run.recipe.stages[stage].quantize
    assert config is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QatkitWarning)  # training already reported it
        fold_batchnorm(model)
        prepare_qat(model, **config.arguments)
    return model
