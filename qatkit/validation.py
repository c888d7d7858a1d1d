"""Everything about a recipe that can be known before a weight is read: its code, its arguments, its layer names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.factories import build, check_arguments, resolve
from qatkit.pruning.layers import check_pattern, prunable_layers
from qatkit.pruning.masks import check_nm
from qatkit.quantization.prepare import prepare_qat, strip_qat
from qatkit.recipe import Recipe
from qatkit.tracking import check_logger

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
            the recipe says, or the logger's package is missing.

    Example:
        >>> from qatkit.loading import load_recipe
        >>> validate_recipe(load_recipe("vision/digits_int4"))["qat"]
        ['conv1', 'conv2', 'conv3', 'classifier']
    """
    check_logger(recipe.trainer)
    for name, stage in recipe.stages.items():
        if stage.distill is not None and recipe.teacher_of(name) is None:
            warnings.warn(
                f"stages.{name}.distill: no stage comes before it to teach, so the model teaches as its factory makes "
                "it; untrained it teaches nothing: put a dense stage first",
                QatkitWarning,
                stacklevel=2,
            )
    data = resolve(recipe.data.factory, "data.factory", allow)
    check_arguments(data, recipe.data.args, "data.args", DATA_ARGUMENTS)
    model = _meta_model(recipe, allow)
    layers = {}
    for name, stage in recipe.stages.items():
        if stage.prune is not None:
            try:
                chosen = prunable_layers(model, stage.prune.include, stage.prune.exclude)
                for pattern in stage.prune.layers:
                    check_pattern(f"layers['{pattern}']", pattern, list(chosen))
                for layer, module in chosen.items():
                    if stage.prune.nm is not None:
                        check_nm(layer, cast(Tensor, module.weight), stage.prune.nm[0], stage.prune.nm[1])
            except QatkitError as error:
                joint = ": " if str(error).startswith("layer '") else "."
                raise QatkitError(f"stages.{name}.prune{joint}{error}") from None
        if (config := stage.quantize) is None:
            continue
        try:
            layers[name] = prepare_qat(model, **config.arguments)
        except QatkitError as error:
            joint = "." if re.match(r"(include\[|exclude\[|layers\[|kv_cache)", str(error)) else ": "
            raise QatkitError(f"stages.{name}.quantize{joint}{error}") from None
        strip_qat(model)
    return layers


def _meta_model(recipe: Recipe, allow: Sequence[str]) -> nn.Module:
    """The recipe's model with shapes and names but without values."""
    try:
        with torch.device("meta"):
            model = build(recipe.model, "model", allow)
    except QatkitError:
        raise
    except Exception as error:  # a factory may raise anything
        said = f"{type(error).__name__}: {error}"
        raise QatkitError(
            f"model.factory: '{recipe.model.factory}' fails on torch's meta device ({said[:300]}); "
            "it must build a model without reading the values of its weights"
        ) from error
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise QatkitError(f"model.factory: '{recipe.model.factory}' returned {kind}; it must return an nn.Module")
    return model
