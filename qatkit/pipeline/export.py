"""The export step: every finished stage that the comparison shows, written in the recipe's format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.export.compressed_tensors import export_compressed
from qatkit.export.dense import export_dense
from qatkit.export.onnx import export_onnx
from qatkit.export.sparse import export_sparse
from qatkit.run.folder import Run

NAMES = {
    "onnx": "model.onnx",
    "dense": "model.safetensors",
    "sparse": "model.sparse.safetensors",
    "compressed_tensors": "",
}


def exported_path(run: Run, stage: str) -> Path:
    """Where the exported file of a stage is, or the folder that is loaded as a whole."""
    return run.out / "export" / stage / NAMES[format_of(run)]


def exported_bytes(path: Path) -> int:
    """The size of an exported file, or of the weights in an exported folder."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def export_run(run: Run) -> list[Path]:
    """Export every stage that the comparison shows, in the format of the recipe.

    Raises:
        QatkitError: a stage is not finished, or the format cannot hold what the recipe trained.
    """
    data = held_out_data(run)
    paths = []
    for stage in run.rows:
        run.record(stage)
        path = exported_path(run, stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        model = run.load_model(stage).eval()
        if format_of(run) == "onnx":
            export_onnx(model, example_of(data), path)
        elif format_of(run) == "compressed_tensors":
            export_compressed(model, path)
            _describe(data, folder=path)
        else:
            (export_sparse if format_of(run) == "sparse" else export_dense)(model, path)
            _describe(model, data, folder=path.parent)
        paths.append(path)
    return paths


def format_of(run: Run) -> str:
    if run.recipe.export is None:
        raise QatkitError("export: the recipe has no such block; write export: {format: onnx}")
    return run.recipe.export.format


def held_out_data(run: Run) -> LightningDataModule:
    # what was trained fits into memory; the logits of a large vocabulary may not at 64
    data = run.build_data(batch_size=min(64, *(stage.batch_size for stage in run.recipe.stages.values())))
    data.prepare_data()
    data.setup("test")
    return data


def example_of(data: LightningDataModule) -> Tensor:
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
