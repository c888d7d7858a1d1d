"""The export step, which writes every finished stage of the comparison in each format of the run."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qatkit.errors import QatkitError, QatkitWarning, under
from qatkit.export.exporting import write_export
from qatkit.export.format_row import ExportFormat
from qatkit.export.formats import FORMATS
from qatkit.export.interface import ExportContext
from qatkit.export.verification import check_python
from qatkit.quantization.selection import select
from qatkit.quantization.targets import TARGETS
from qatkit.recipe import QuantizeConfig, Recipe
from qatkit.run.exports import Exported, add_to_run, added_exports, exports_of, formats_by_key, interpreter_of
from qatkit.run.folder import Run
from qatkit.schemes import Scheme
from qatkit.tasks.table import Task, declared_task

if TYPE_CHECKING:  # `qatkit validate` imports this module
    from lightning.pytorch import LightningDataModule


VERDICT = "verification.json"
"""The file in the export folder of a stage and format that `qatkit verify` writes."""


def exported_stages(recipe: Recipe) -> list[str]:
    """Return the exported stages, which are the stages in the comparison."""
    return Run(recipe, Path()).rows


def check_export(recipe: Recipe, stage: str, model: nn.Module, task: Task | None) -> None:
    """Raise an error if one of the recipe's export formats does not support the result of a stage.

    Weights are not read.

    Args:
        recipe: The recipe, whose ``export`` block sets the formats; without this block, nothing is checked.
        stage: A stage in the comparison.
        model: The stage's model, with plain layers; may be on the meta device.
        task: The task that the data declares.

    Raises:
        QatkitError: a format does not support the result, or the interpreter of its runtime does not exist; the error
            includes the stage and, if known, the layer.
    """
    rows = formats_by_key(recipe)
    config = recipe.stages[stage].quantize
    if rows and config is not None and config.target is not None:
        needed, key = TARGETS[config.target].formats, next(iter(rows))
        if not {row.name for row in rows.values()} & set(needed):
            raise QatkitError(
                f"'{rows[key].name}' is not the format of target '{config.target}' in stage '{stage}'",
                key=key,
                advice=f"use {' or '.join(needed)}, or remove quantize.target",
            )
    for key, row in rows.items():
        check_format(row, key, stage, config, model, task)
        check_python([row], interpreter_of(recipe, row), f"{key.removesuffix('format')}python")


def check_format(
    row: ExportFormat, key: str, stage: str, config: QuantizeConfig | None, model: nn.Module, task: Task | None
) -> None:
    """Raise an error if a format does not support the result of a stage, or if a package is missing.

    Args:
        row: The format.
        key: The recipe key or the option that names it, for errors.
        stage: The stage.
        config: The stage's ``quantize`` block, or None.
        model: The stage's model, with plain layers; may be on the meta device.
        task: The task that the data declares.

    Raises:
        QatkitError: as above; the error includes the stage and, if known, the layer.
    """
    try:
        codes = config is not None and config.target is not None and TARGETS[config.target].linear_codes
        kv_cache = config is not None and config.kv_cache is not None
        row.check_model(model, _schemes(config, model), kv_cache, task, codes)
        row.check_packages()
    except QatkitError as error:
        raise error.with_fields(key=key, problem=f"stage '{stage}': {error.problem}") from None


def check_export_tokenizer(recipe: Recipe, tokenizer: Any) -> None:
    """Raise an error if one of the recipe's export formats does not support the tokenizer of the data.

    Args:
        recipe: The recipe; without an ``export`` block, nothing is checked.
        tokenizer: The tokenizer, or None.

    Raises:
        QatkitError: a format stores the tokenizer in its file, and does not support this one.
    """
    for key, row in formats_by_key(recipe).items():
        if row.check_tokenizer:
            with under(key):
                row.call("check_tokenizer", tokenizer)


def _schemes(config: QuantizeConfig | None, model: nn.Module) -> dict[str, Scheme]:
    if config is None:
        return {}
    selection = {key: value for key, value in config.arguments.items() if key != "share_inputs"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QatkitWarning)  # the check of the quantize block gives it
        return select(model, **selection)


def export_run(run: Run) -> list[Path]:
    """Export every stage in the comparison in each format of `formats_of`.

    Returns:
        The exported files or folders.

    Raises:
        QatkitError: a stage is not finished, a format does not support the trained model, or a file would be written
            outside the run's folder.
    """
    run.check_writes()
    run.check_recipe()
    return write_exports(run, exports_of(run), held_out_data(run))


def add_format(run: Run, name: str) -> list[Path]:
    """Export every stage in the comparison in one more format, which need not be in the recipe.

    The format is checked for all stages before the first is written. Once all are written, it belongs to the run:
    `formats_of` finds its files. If writing fails, the folders that it created are removed.

    Args:
        run: A run with finished stages.
        name: The format's name.

    Returns:
        The exported files or folders.

    Raises:
        QatkitError: the format is unknown, a stage is not finished, the format does not support the trained model or
            the tokenizer, or a file would be written outside the run's folder.
    """
    run.check_writes()
    run.check_recipe()
    row, data = FORMATS.row(name, "--format"), held_out_data(run)
    models, task = run.stage_models(), declared_task(data)
    for stage in run.rows:
        run.record(stage)
        check_format(row, "--format", stage, run.recipe.stages[stage].quantize, models[stage], task)
    if row.check_tokenizer:
        with under("--format"):
            row.call("check_tokenizer", getattr(data, "tokenizer", None))
    exports = added_exports(run, row)
    created = [each.folder for each in exports if not each.folder.exists()]
    try:
        paths = write_exports(run, exports, data)
    except BaseException:  # interrupted with Ctrl+C, too
        for folder in created:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    add_to_run(run, row)
    return paths


def write_exports(run: Run, exports: Sequence[Exported], data: LightningDataModule) -> list[Path]:
    """Write exports of a run.

    Args:
        run: The run.
        exports: The exports to write.
        data: The data of `held_out_data`.

    Returns:
        The exported files or folders.

    Raises:
        QatkitError: a stage is not finished, or a format does not support the trained model.
    """
    batch, task, tokenizer = first_batch(data), declared_task(data), getattr(data, "tokenizer", None)
    for stage in run.rows:
        run.record(stage)
    for each in exports:
        model = run.load_model(each.stage).eval()
        quantize = run.recipe.stages[each.stage].quantize
        target = None if quantize is None or quantize.target is None else TARGETS[quantize.target]
        each.path.parent.mkdir(parents=True, exist_ok=True)
        (each.folder / VERDICT).unlink(missing_ok=True)  # it is about the file that is replaced
        own = target if target is not None and each.format.name in target.formats else None
        write_export(each.format, model, each.path, ExportContext(batch, task, own, tokenizer))
    return [each.path for each in exports]


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
