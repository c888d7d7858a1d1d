"""Check a recipe's code, arguments and layer names before any weights are read."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qatkit import stages as blocks
from qatkit.common.device import device_type
from qatkit.errors import QatkitError, QatkitWarning, under
from qatkit.pipeline.export import check_export, exported_stages
from qatkit.pipeline.logger_check import check_logger
from qatkit.quantization.coverage import Coverage
from qatkit.recipe import DistillConfig, EvaluateConfig, Recipe
from qatkit.recipe.factories import check_arguments, resolve
from qatkit.report.language import check_harness, next_token_only
from qatkit.run.compatibility import positions_of, with_tokenizer
from qatkit.run.stage_models import StageModels
from qatkit.stages.optimizers import check_optimizer
from qatkit.tasks import declared_task
from qatkit.tasks.detection import check_model as check_detector

DATA_ARGUMENTS = ("batch_size", "seed")
"""The arguments that the pipeline passes to a data factory in addition to those in the recipe."""


def validate_recipe(recipe: Recipe, allow: Sequence[str] = ()) -> dict[str, Coverage]:
    """Check a recipe against the code it refers to, with models on the meta device and without reading data.

    Args:
        recipe: A loaded recipe.
        allow: Packages, in addition to qatkit's factories, whose code the recipe may use.

    Returns:
        For every stage with a `quantize` block, the layers that it quantizes and the layers that it does not.

    Raises:
        QatkitError: an argument is not valid for its factory, a glob matches no layer, a layer cannot be quantized as
            the recipe specifies, or a required package is missing.

    Example:
        >>> from qatkit.recipe.loading import load_recipe
        >>> validate_recipe(load_recipe("vision/digits_int4"))["qat"].quantized
        ['conv1', 'conv2', 'conv3', 'classifier']
    """
    check_logger(recipe.trainer)
    if recipe.evaluate is not None and recipe.evaluate.tasks:
        check_harness(recipe.evaluate.tasks, allow)
    for name, stage in recipe.stages.items():
        if stage.distill is not None and recipe.teacher_of(name) is None:
            warnings.warn(
                f"stages.{name}.distill: no earlier stage can be the teacher, so the teacher is the model that the "
                "factory builds, which may be untrained; put a dense stage first",
                QatkitWarning,
                stacklevel=2,
            )
    data = resolve(recipe.data.factory, "data.factory", allow)
    check_arguments(data, with_tokenizer(recipe.data, recipe.model, allow).args, "data.args", DATA_ARGUMENTS)
    task = declared_task(data, "data.factory")
    if task is not None:
        task.check_packages()
    if recipe.evaluate is not None and task is not None and not task.next_token:
        raise next_token_only(task)
    models = StageModels(recipe, allow)
    layers = {}
    for name, stage in recipe.stages.items():
        model = models[name]
        if task is not None and task.kind == "boxes":
            check_detector(model)
        if recipe.evaluate is not None:
            with under("evaluate"):
                _check_windows(recipe.evaluate, recipe.data.args, data, model)
        if stage.early_stopping is not None and task is not None and "loss" not in task.metrics:
            raise QatkitError(
                f"early stopping monitors the validation loss, but models for the task '{task.name}' do not report one",
                key=f"stages.{name}.early_stopping",
                advice="remove the block, and set max_steps",
            )
        if stage.max_steps:
            if stage.lora is None:
                _check_dtype(name, model)
            with under(f"stages.{name}"):
                check_optimizer(stage.optimizer, torch.device(device_type(recipe.trainer.accelerator)))
        if stage.distill is not None:
            with under(f"stages.{name}.distill"):
                _check_prompts(stage.distill, recipe.data.factory, bool(getattr(data, "packed", False)))
                blocks.distill.check(stage.distill, recipe.trainer, model, models.teacher(name), task)
        if stage.samples is not None:
            with under(f"stages.{name}"):
                blocks.samples.check(stage.samples, model)
        if stage.prune is not None:
            with under(f"stages.{name}.prune"):
                blocks.prune.check(stage.prune, model)
        if stage.lora is not None:
            with under(f"stages.{name}.lora"):
                blocks.lora.check(stage.lora, stage, recipe.trainer, model)
        if stage.quantize is not None:
            with under(f"stages.{name}.quantize"):
                layers[name] = blocks.quantize.check(stage.quantize, model)
        if name in exported_stages(recipe):
            check_export(recipe, name, model, task)
    return layers


def _check_windows(config: EvaluateConfig, args: Mapping[str, Any], data: Callable[..., Any], model: nn.Module) -> None:
    """Refuse windows that the model has no positions for, and a stride beyond the window."""
    longest = positions_of(model)
    if config.context is not None and longest is not None and config.context > longest:
        raise QatkitError(
            f"{config.context} exceeds the model's {longest} positions",
            key="context",
            advice=f"use at most {longest}",
        )
    parameter = inspect.signature(data).parameters.get("context")
    sample = args.get("context", parameter.default if parameter is not None else None)
    context = config.context or sample
    if isinstance(context, int):
        config.check_stride(context)


def _check_dtype(name: str, model: nn.Module) -> None:
    """Refuse to train float16 weights: in float16, Adam's squares of small gradients underflow to zero."""
    half = next((key for key, parameter in model.named_parameters() if parameter.dtype == torch.float16), None)
    if half is not None:
        raise QatkitError(
            f"'{half}' is in float16, but training turns float16 weights into NaN",
            key=f"stages.{name}",
            advice="use model.args.dtype: float32 with trainer.precision: 16-mixed, or dtype: bfloat16, or train "
            "adapters (lora)",
        )


def _check_prompts(config: DistillConfig, factory: str, packed: bool) -> None:
    """Refuse to generate from rows that hold several documents: the text would only continue the last of them."""
    for key in ("on_policy", "sequence_level"):
        if packed and getattr(config, key) is not None:
            raise QatkitError(
                f"{key} needs rows that start with a prompt, but {factory} packs several documents into each row",
                key=key,
                advice=f'set data.factory: "qatkit.data:chat" or "qatkit.data:stdlib_text", or remove {key}',
            )
