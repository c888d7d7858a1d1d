"""From finished stages to files that are verified, measured and compared."""

from __future__ import annotations

import json
import os
import platform
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.export.compressed import export_compressed
from qatkit.export.dense import export_dense
from qatkit.export.onnx import export_onnx
from qatkit.export.runtime import integer_kernels
from qatkit.export.sparse import dense_bytes, export_sparse
from qatkit.export.verify import Verification, verify
from qatkit.pipeline.evaluation import evaluate_run
from qatkit.pipeline.loop import Run
from qatkit.quantization.folding import fold_batchnorm
from qatkit.quantization.prepare import prepare_qat
from qatkit.report.bench import compare, side_by_side
from qatkit.report.curves import read_curves
from qatkit.report.histograms import weight_histograms
from qatkit.report.page import render
from qatkit.report.tables import markdown
from qatkit.run.checkpoint import measured_zeros, write_atomically
from qatkit.tasks import call, one_sample

NAMES = {
    "onnx": "model.onnx",
    "dense": "model.safetensors",
    "sparse": "model.sparse.safetensors",
    "compressed_tensors": "",
}
RUNTIMES = {"onnx": ["onnx", "onnxruntime"], "compressed_tensors": ["transformers", "compressed_tensors"]}


def exported_path(run: Run, stage: str) -> Path:
    """Where the exported file of a stage is, or the folder that is loaded as a whole."""
    return run.out / "export" / stage / NAMES[_format(run)]


def exported_bytes(path: Path) -> int:
    """The size of an exported file, or of the weights in an exported folder."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _verification(run: Run, stage: str) -> Path:
    return run.out / "export" / stage / "verification.json"


def export_run(run: Run) -> list[Path]:
    """Export every stage that the comparison shows, in the format of the recipe.

    Raises:
        QatkitError: a stage is not finished, or the format cannot hold what the recipe trained.
    """
    data = _data(run)
    paths = []
    for stage in run.rows:
        run.record(stage)
        path = exported_path(run, stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        model = run.load_model(stage).eval()
        if _format(run) == "onnx":
            export_onnx(model, _example(data), path)
        elif _format(run) == "compressed_tensors":
            export_compressed(model, path)
            _describe(data, folder=path)
        else:
            (export_sparse if _format(run) == "sparse" else export_dense)(model, path)
            _describe(model, data, folder=path.parent)
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
        write_atomically(_verification(run, stage), json.dumps(asdict(checked[stage]), indent=1))
    return checked


def report_run(run: Run) -> dict[str, Any]:
    """Measure the exported files in one process and write ``report.json`` and ``report.md``."""
    paths = {stage: exported_path(run, stage) for stage in run.rows}
    latencies = compare(paths, _example(_data(run))) if _format(run) == "onnx" else {}
    scores = evaluate_run(run, _data(run)) if run.recipe.evaluate else {}
    costs = _latencies(run)
    rows = []
    for stage, path in paths.items():
        record = run.record(stage)
        verification = _verification(run, stage)
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
                "dense_bytes": dense_bytes(path) if _format(run) == "sparse" else None,
                "cost": record.cost | costs.get(stage, {}),
                "latency": latencies.get(stage, []),
                "kernels": asdict(integer_kernels(path)) if _format(run) == "onnx" else None,
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
        "format": _format(run),
        "written": datetime.now().astimezone().isoformat(" ", "minutes"),
        "rows": rows,
        "stages": [_training(run, stage) for stage in run.recipe.stages],
        "recipe": (run.out / "recipe.yaml").read_text(encoding="utf-8"),
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {
            name: version(name)
            for name in ("qatkit", "torch", "lightning", *RUNTIMES.get(_format(run), []))
            if _installed(name)
        }
        | {"python": platform.python_version()},
    }
    write_atomically(run.out / "report.json", _json(content))
    write_atomically(run.out / "report.md", markdown(content))
    return content


def write_page(folders: Sequence[Path], page: Path) -> None:
    """Draw what the ``report.json`` of one run or of several holds as one HTML file.

    Raises:
        QatkitError: a folder has no report that this version wrote, or matplotlib or jinja2 is not installed.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise QatkitError("the same run is named twice; name every run once")
    reports = []
    for folder in folders:
        path = folder / "report.json"
        if not path.is_file():
            raise QatkitError(f"{path} does not exist; run `qatkit report {folder}` first")
        content = json.loads(path.read_text(encoding="utf-8"))
        if "stages" not in content or any("metric" not in row["verification"] for row in content["rows"]):
            raise QatkitError(f"{path} is of an older version; run `qatkit report {folder}` to write it again")
        reports.append(content)
    text = render(reports, folders)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(page, text)


def track_run(run: Run, content: dict[str, Any]) -> None:
    """Send the report and the exported files to the recipe's tracker, where it has one, and close it."""
    pages = [run.out / name for name in ("report.html", "report.md", "report.json")]
    models = {row["stage"]: exported_path(run, row["stage"]) for row in content["rows"]}
    run.tracking.log_report(content, [page for page in pages if page.exists()], models)


def _latencies(run: Run) -> dict[str, dict[str, float]]:
    """How long plain torch takes for one sample, where the stages do not all have the same model."""
    if all(run.record(stage).architecture is None for stage in run.rows):
        return {}
    batch = one_sample(next(iter(_data(run).test_dataloader())))
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


def _format(run: Run) -> str:
    if run.recipe.export is None:
        raise QatkitError("export: the recipe has no such block; write export: {format: onnx}")
    return run.recipe.export.format


def _data(run: Run) -> LightningDataModule:
    # what was trained fits into memory; the logits of a large vocabulary may not at 64
    data = run.build_data(batch_size=min(64, *(stage.batch_size for stage in run.recipe.stages.values())))
    data.prepare_data()
    data.setup("test")
    return data


def _example(data: LightningDataModule) -> Tensor:
    batch = next(iter(data.test_dataloader()))
    if isinstance(batch, Mapping):
        raise QatkitError(
            f"export.format: 'onnx' takes models of one input, and a batch of the data holds {sorted(batch)}; "
            "write export: {format: dense}"
        )
    inputs: Tensor = batch[0]
    return inputs


def _describe(*owners: nn.Module | LightningDataModule, folder: Path) -> None:
    """Beside the weights of a model of transformers: its config and tokenizer, so that `from_pretrained` loads all."""
    for part in (getattr(owner, name, None) for owner in owners for name in ("config", "tokenizer")):
        if part is not None and hasattr(part, "save_pretrained"):
            part.save_pretrained(folder)


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None
