"""The layers of a recipe's model or of a config, for `qatkit profile` and `qatkit cost`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qatkit.cli.inputs import load
from qatkit.cli.output import echo
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from torch import nn

    from qatkit.advise.phases import Phases

_CONTEXT = 2048


def load_phases(
    what: str, overrides: Sequence[str] | None, batch: int, context: int | None, allow: Sequence[str]
) -> Phases:
    """Return the costs of a model's layers by phase; weights are not read.

    Args:
        what: A recipe, or a folder with the config.json of a transformers model.
        overrides: Values of the recipe to override.
        batch: Samples or sequences per call.
        context: Tokens per sequence of a language model; None is 2048.
        allow: Additional packages whose code the recipe may use.

    Raises:
        QatkitError: an argument does not apply to the model.
    """
    from qatkit.advise.phases import is_language_model, model_of_config, served_context
    from qatkit.advise.situation import phases_of

    def of_language(model: nn.Module) -> Phases:
        tokens, shortened = served_context(model, context or _CONTEXT)
        if shortened:
            echo(f"note: {shortened}", err=True)
        return phases_of(model, None, batch, tokens)

    folder = Path(what)
    if folder.is_dir():
        if overrides:
            raise QatkitError(
                "a config has no recipe keys to override", key=overrides[0], advice="edit the config, or pass a recipe"
            )
        return of_language(model_of_config(folder))
    from qatkit.pipeline.profiling import meta_inputs
    from qatkit.run.architecture import meta_model

    recipe = load(what, list(overrides or []))
    model = meta_model(recipe.model, allow).eval()
    if is_language_model(model):
        return of_language(model)
    if context is not None:
        raise QatkitError("the model is not a language model", key="--context", advice="remove the option")
    return phases_of(model, meta_inputs(recipe, batch, allow), batch, 0)
