"""Everything about a recipe that can be known before a weight is read: its code, its arguments, its layer names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from qatkit import stages as blocks
from qatkit.common.device import device_type
from qatkit.errors import QatkitError, QatkitWarning
from qatkit.pipeline.export import check_export, exported_stages
from qatkit.pipeline.logger_check import check_logger
from qatkit.recipe import DistillConfig, Recipe
from qatkit.recipe.factories import check_arguments, resolve
from qatkit.report.language import check_harness, next_token_only
from qatkit.run.compatibility import with_tokenizer
from qatkit.run.stage_models import StageModels
from qatkit.stages.optimizers import check_optimizer
from qatkit.tasks import declared_task

# What the pipeline passes to a data factory besides the recipe's arguments.
DATA_ARGUMENTS = ("batch_size", "seed")


def validate_recipe(recipe: Recipe, allow: Sequence[str] = ()) -> dict[str, list[str]]:
    """Check a recipe against the code it names, on a model without memory; no data is touched.

    Args:
        recipe: A loaded recipe.
        allow: Packages besides qatkit's factories that the recipe may name code from.

    Returns:
        For every stage that quantizes: the names of the layers that it quantizes.

    Raises:
        QatkitError: a factory or an argument does not fit, a glob matches no layer, or a layer cannot be quantized as
            the recipe says, or a package that the recipe needs is missing.

    Example:
        >>> from qatkit.recipe.loading import load_recipe
        >>> validate_recipe(load_recipe("vision/digits_int4"))["qat"]
        ['conv1', 'conv2', 'conv3', 'classifier']
    """
    check_logger(recipe.trainer)
    if recipe.evaluate is not None and recipe.evaluate.tasks:
        check_harness()
    for name, stage in recipe.stages.items():
        if stage.distill is not None and recipe.teacher_of(name) is None:
            warnings.warn(
                f"stages.{name}.distill: no stage comes before it to teach, so the model teaches as its factory makes "
                "it; untrained it teaches nothing: put a dense stage first",
                QatkitWarning,
                stacklevel=2,
            )
    data = resolve(recipe.data.factory, "data.factory", allow)
    check_arguments(data, with_tokenizer(recipe.data, recipe.model, allow).args, "data.args", DATA_ARGUMENTS)
    task = declared_task(data, "data.factory")
    if recipe.evaluate is not None and task is not None and not task.next_token:
        raise next_token_only(task)
    models = StageModels(recipe, allow)
    layers = {}
    for name, stage in recipe.stages.items():
        model = models[name]
        if stage.max_steps:
            if stage.lora is None:
                _check_dtype(name, model)
            with _at(f"stages.{name}"):
                check_optimizer(stage.optimizer, torch.device(device_type(recipe.trainer.accelerator)))
        if stage.distill is not None:
            with _at(f"stages.{name}.distill"):
                _check_prompts(stage.distill, recipe.data.factory, bool(getattr(data, "packed", False)))
                blocks.distill.check(stage.distill, recipe.trainer, model, models.teacher(name))
        if stage.samples is not None:
            with _at(f"stages.{name}"):
                blocks.samples.check(stage.samples, model)
        if stage.prune is not None:
            with _at(f"stages.{name}.prune"):
                blocks.prune.check(stage.prune, model)
        if stage.lora is not None:
            with _at(f"stages.{name}.lora"):
                blocks.lora.check(stage.lora, stage, recipe.trainer, model)
        if stage.quantize is not None:
            with _at(f"stages.{name}.quantize"):
                layers[name] = blocks.quantize.check(stage.quantize, model)
        if name in exported_stages(recipe):
            check_export(recipe, name, model, task)
    return layers


def _check_dtype(name: str, model: nn.Module) -> None:
    """Refuse to train weights of a dtype in which the squares that Adam keeps of small gradients are zero."""
    half = next((key for key, parameter in model.named_parameters() if parameter.dtype == torch.float16), None)
    if half is not None:
        raise QatkitError(
            f"stages.{name}: '{half}' is in float16, and weights that are themselves trained in it become NaN; write "
            "model.args.dtype: float32 with trainer.precision: 16-mixed, or dtype: bfloat16, or train adapters (lora)"
        )


def _check_prompts(config: DistillConfig, factory: str, packed: bool) -> None:
    """Refuse to continue rows that hold several documents: what is written would belong to the last of them alone."""
    for key in ("on_policy", "sequence_level"):
        if packed and getattr(config, key) is not None:
            raise QatkitError(
                f"{key}: it continues the beginnings of texts, and {factory} packs several documents into a row; "
                'write data.factory: "qatkit.data:chat" or "qatkit.data:stdlib_text", or leave it out'
            )


@contextmanager
def _at(key: str) -> Iterator[None]:
    """Put the key of a block before an error, which starts with a key inside the block or with a layer."""
    try:
        yield
    except QatkitError as error:
        joint = "." if re.match(r"\w+(\[[^]]*\])?(\.\w+)*:|\w+\[", str(error)) else ": "
        raise QatkitError(f"{key}{joint}{error}") from None
