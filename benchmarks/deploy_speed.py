"""The speed of `deploy.py`'s files relative to the floating-point file in the same runtime, called alternately."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from deploy_models import Model

from qatkit import QatkitError
from qatkit.export.decoding import Decoder
from qatkit.export.exporting import write_export
from qatkit.export.format_row import ExportFormat
from qatkit.export.interface import ExportContext
from qatkit.export.separate import SeparateError
from qatkit.pipeline.baselines import example_of
from qatkit.report.bench import File, compare_files
from qatkit.report.decoding import ratios, time_decoders
from qatkit.tasks import TASKS

PROMPT, NEW, SECONDS = 24, 16, 2.0
"""Of a language model: tokens that it reads and writes, and the time per file."""
BATCH = 16


def speeds(
    model: Model, form: ExportFormat, paths: Mapping[str, Path], folder: Path, python: Path | None
) -> dict[str, str]:
    """The speed of each file, or why it is not measured: of decode for language models, otherwise of one batch.

    Args:
        model: The model.
        form: The format.
        paths: Its files by scheme.
        folder: Where the floating-point file is written.
        python: The interpreter of an environment with the runtime, or None.
    """
    causal = model.task == "causal"
    if not form.benchmark and not (form.decoder and causal):
        reason = form.untimed
    elif form.environment and python is None:
        reason = "not run here"
    else:
        try:
            dense = form.path(folder / "dense")
            dense.parent.mkdir(parents=True, exist_ok=True)
            context = ExportContext(model.batches[0], TASKS[model.task], tokenizer=model.tokenizer)
            write_export(form, model.dense, dense, context)
            files = {"fp32": dense, **paths}
            return _written(form, files, python) if not form.benchmark else _called(model, form, files)
        except (QatkitError, SeparateError) as error:
            reason = str(error)
    return dict.fromkeys(paths, f"not measured: {reason}")


def _written(form: ExportFormat, files: Mapping[str, Path], python: Path | None) -> dict[str, str]:
    with ExitStack() as stack:
        decoders = {}
        for name, path in files.items():
            decoders[name] = Decoder(form, path, 1, python)
            stack.callback(decoders[name].close)
        sizes = {name: form.size(path) for name, path in files.items()}
        found = time_decoders(decoders, sizes, list(range(1, PROMPT + 1)), NEW, SECONDS)
    return {
        name: f"{ratios(file, found['fp32'])['decode'].median:.2f} (decode)"
        for name, file in found.items()
        if name != "fp32"
    }


def _called(model: Model, form: ExportFormat, files: Mapping[str, Path]) -> dict[str, str]:
    example: Any = example_of(model.batches[0])
    found = compare_files({name: File(path, example, form.name) for name, path in files.items()}, [BATCH])
    times = {name: rows[0]["median_ms"] for name, rows in found.items()}
    return {name: f"{times['fp32'] / time:.2f}" for name, time in times.items() if name != "fp32"}
