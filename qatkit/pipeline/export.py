"""The export step, which writes every finished stage of the comparison in the recipe's format."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qatkit.errors import QatkitError, QatkitWarning, under
from qatkit.export.companions import save_companions
from qatkit.export.formats import FORMATS, ExportFormat
from qatkit.export.interface import ExportContext
from qatkit.quantization.selection import select
from qatkit.quantization.targets import TARGETS
from qatkit.recipe import QuantizeConfig, Recipe
from qatkit.run.folder import Run
from qatkit.schemes import Scheme
from qatkit.tasks.table import Task, declared_task

if TYPE_CHECKING:  # `qatkit validate` imports this module
    from lightning.pytorch import LightningDataModule


VERDICT = "verification.json"
"""The file in a stage's export folder that `qatkit verify` writes."""


def exported_stages(recipe: Recipe) -> list[str]:
    """Return the exported stages, which are the stages in the comparison."""
    return Run(recipe, Path()).rows


def check_export(recipe: Recipe, stage: str, model: nn.Module, task: Task | None) -> None:
    """Raise an error if the recipe's export format does not support the result of a stage. Weights are not read.

    Args:
        recipe: The recipe, whose ``export`` block sets the format; without this block, nothing is checked.
        stage: A stage in the comparison.
        model: The stage's model, with plain layers; may be on the meta device.
        task: The task that the data declares.

    Raises:
        QatkitError: the format does not support the result; the error includes the stage and, if known, the layer.
    """
    if recipe.export is None:
        return
    row = FORMATS.row(recipe.export.format, "export.format")
    config = recipe.stages[stage].quantize
    if config is not None and config.target is not None and row.name not in TARGETS[config.target].formats:
        raise QatkitError(
            f"'{row.name}' is not the format of target '{config.target}' in stage '{stage}'",
            key="export.format",
            advice=f"use {' or '.join(TARGETS[config.target].formats)}, or remove quantize.target",
        )
    try:
        row.check_model(model, _schemes(config, model), config is not None and config.kv_cache is not None, task)
        row.check_packages()
    except QatkitError as error:
        raise error.with_fields(key="export.format", problem=f"stage '{stage}': {error.problem}") from None


def check_export_tokenizer(recipe: Recipe, tokenizer: Any) -> None:
    """Raise an error if the recipe's export format does not support the tokenizer of the data.

    Args:
        recipe: The recipe; without an ``export`` block, nothing is checked.
        tokenizer: The tokenizer, or None.

    Raises:
        QatkitError: the format stores the tokenizer in its file, and does not support this one.
    """
    if recipe.export is None:
        return
    row = FORMATS.row(recipe.export.format, "export.format")
    if row.check_tokenizer:
        with under("export.format"):
            row.call("check_tokenizer", tokenizer)


def _schemes(config: QuantizeConfig | None, model: nn.Module) -> dict[str, Scheme]:
    if config is None:
        return {}
    selection = {key: value for key, value in config.arguments.items() if key != "share_inputs"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QatkitWarning)  # the check of the quantize block gives it
        return select(model, **selection)


def export_run(run: Run) -> list[Path]:
    """Export every stage in the comparison in the recipe's format.

    Returns:
        The exported files or folders.

    Raises:
        QatkitError: a stage is not finished, the format does not support the trained model, or a file would be written
            outside the run's folder.
    """
    run.check_writes()
    run.check_recipe()
    row, data = format_of(run), held_out_data(run)
    batch = first_batch(data)
    paths = []
    for stage in run.rows:
        run.record(stage)
        path = exported_path(run, stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        (run.out / "export" / stage / VERDICT).unlink(missing_ok=True)  # it is about the file that is replaced
        model = run.load_model(stage).eval()
        quantize = run.recipe.stages[stage].quantize
        target = None if quantize is None or quantize.target is None else TARGETS[quantize.target]
        tokenizer = getattr(data, "tokenizer", None)
        row.call("write", model, path, ExportContext(batch, declared_task(data), target, tokenizer))
        save_companions(row.companions, model, tokenizer, run.out / "export" / stage)
        paths.append(path)
    return paths


def exported_path(run: Run, stage: str) -> Path:
    """Return the path of a stage's exported file or folder."""
    return format_of(run).path(run.out / "export" / stage)


def format_of(run: Run) -> ExportFormat:
    """Return the recipe's export format.

    Raises:
        QatkitError: the recipe has no ``export`` block.
    """
    if run.recipe.export is None:
        raise QatkitError(
            "the recipe has no such block",
            key="export",
            advice="add export: {format: onnx}",
            origin=str(run.out / "recipe.yaml"),
        )
    return FORMATS.row(run.recipe.export.format, "export.format")


def held_out_data(run: Run) -> LightningDataModule:
    """Return the recipe's data, set up for the test split."""
    # the largest batch that is known to fit into memory; logits of a large vocabulary may not fit at 64
    data = run.build_data(batch_size=min(64, *(stage.batch_size for stage in run.recipe.stages.values())))
    data.prepare_data()
    data.setup("test")
    return data


def first_batch(data: LightningDataModule) -> Any:
    """Return the first batch of the test split."""
    return next(iter(data.test_dataloader()))
