"""Everything about a recipe that can be known before a weight is read: its code, its arguments, its layer names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from qatkit import blocks
from qatkit.architecture import meta_model
from qatkit.errors import QatkitError, QatkitWarning
from qatkit.factories import check_arguments, resolve
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
    model = meta_model(recipe.model, allow)
    layers = {}
    for name, stage in recipe.stages.items():
        if stage.model is not None:
            model = meta_model(stage.model, allow, f"stages.{name}.model")
        if stage.prune is not None:
            with _at(f"stages.{name}.prune"):
                blocks.prune.check(stage.prune, model)
        if stage.quantize is not None:
            with _at(f"stages.{name}.quantize"):
                layers[name] = blocks.quantize.check(stage.quantize, model)
    return layers


@contextmanager
def _at(key: str) -> Iterator[None]:
    """Put the key of a block before an error, which starts with a key inside the block or with a layer."""
    try:
        yield
    except QatkitError as error:
        joint = "." if re.match(r"\w+(\[[^]]*\])?(\.\w+)*:|\w+\[", str(error)) else ": "
        raise QatkitError(f"{key}{joint}{error}") from None
