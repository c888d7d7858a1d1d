"""The runtime's own post-training quantization, with which a run's exported files are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qatkit.errors import QatkitError
from qatkit.export.format_row import ExportFormat
from qatkit.export.judges import TaskJudge
from qatkit.quantization.prepare import qat_weights
from qatkit.report.bench import Example
from qatkit.run.folder import Run
from qatkit.tasks import call, declared_task, model_inputs

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

CALIBRATION_BATCHES = 16


@dataclass(frozen=True)
class Baselines:
    """Files that the runtime quantized without training."""

    dense: str | None
    """The first floating-point stage, from which the files were made; None if the comparison has no such stage."""
    files: Mapping[str, Path]
    """Files by the name of the function that made them."""
    failure: str = ""
    """The reason why there are no files, although the runtime can quantize."""


def make_baselines(
    run: Run, row: ExportFormat, data: LightningDataModule, paths: Mapping[str, Path], folder: Path
) -> Baselines:
    """Quantize the floating-point file of a run with the runtime's own function, on training batches.

    Args:
        run: A run with exported files.
        row: The export format.
        data: The data of the run.
        paths: The exported files by stage.
        folder: Where the files are written.
    """
    dense = next((stage for stage in paths if not qat_weights(run.load_model(stage))), None)
    if dense is None or not row.baselines:
        return Baselines(dense, {})
    try:
        files = row.call("baselines", paths[dense], _batches(data), folder)
    except QatkitError as error:
        return Baselines(dense, {}, error.problem)
    if taken := files.keys() & paths.keys():
        return Baselines(dense, {}, f"a stage has the same name, '{min(taken)}'; rename the stage")
    return Baselines(dense, files)


def measure_baselines(
    made: Baselines, row: ExportFormat, data: LightningDataModule, latency: Mapping[str, list[Any]]
) -> list[dict[str, Any]]:
    """Return the report's values for each file: metric in the runtime, size, latency and kernels.

    Args:
        made: The files.
        row: The export format.
        data: The data of the run; its test split is scored.
        latency: Measured latencies by file.
    """
    if made.failure:
        return [{"name": row.runtime, "failure": made.failure}]
    return [
        {
            "name": name,
            "failure": "",
            "runtime_metric": _score(row.call("benchmark", path, None), data),
            "bytes": row.size(path),
            "latency": latency.get(name, []),
            "kernels": asdict(row.call("kernels", path)) if row.kernels else None,
        }
        for name, path in made.files.items()
    ]


def example_of(batch: Any) -> Example:
    """Return the inputs of a batch: the first positional one, or all by name."""
    args, tensors = model_inputs(batch)
    return args[0] if args else {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _batches(data: LightningDataModule) -> Iterator[Example]:
    data.setup("fit")  # only if the runtime reads batches
    yield from map(example_of, islice(data.train_dataloader(), CALIBRATION_BATCHES))


@torch.inference_mode()
def _score(runtime: Callable[..., Any], data: LightningDataModule) -> float:
    judge = TaskJudge(declared_task(data))
    for batch in data.test_dataloader():
        judge.add(call(runtime, batch), batch)
    return judge.value()
