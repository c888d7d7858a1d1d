"""The models of stages: the input model of one stage, and all models on the meta device with `shrink` applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from qatkit.errors import under
from qatkit.recipe import FactoryConfig, Recipe
from qatkit.run.architecture import Architecture, build_architecture, meta_model
from qatkit.stages import shrink


def starting_model(
    recipe: Recipe,
    stage: str,
    build: Callable[[FactoryConfig, str], nn.Module],
    load: Callable[[str | None], nn.Module],
) -> nn.Module:
    """Return the input model of a stage, before its own `shrink` block.

    Args:
        recipe: The recipe.
        stage: The stage's name.
        build: Builds the model from a factory; the second argument is the factory's key in the recipe.
        load: Returns the result of an earlier stage, or the recipe's model for None.
    """
    own = recipe.stages[stage].model
    return build(own, f"stages.{stage}.model") if own is not None else load(recipe.parent_of(stage))


class StageModels:
    """The models of a recipe's stages on torch's meta device, with the names and shapes used in training but no values.

    Each model is built on first use and shared by the stages that do not change its shape.

    Args:
        recipe: The recipe.
        allow: Packages, in addition to qatkit, whose factories may be used.
        recorded: Returns the recorded architecture of a finished stage, which includes sizes that depend on values.

    Example:
        >>> from qatkit.recipe.loading import load_recipe
        >>> model = StageModels(load_recipe("vision/digits_int4"))["qat"]
        >>> {parameter.device.type for parameter in model.parameters()}
        {'meta'}
    """

    def __init__(
        self,
        recipe: Recipe,
        allow: Sequence[str] = (),
        recorded: Callable[[str], Architecture | None] = lambda stage: None,
    ) -> None:
        self.recipe = recipe
        self.allow = allow
        self._recorded = recorded
        self._models: dict[str | None, nn.Module] = {}

    def __getitem__(self, stage: str | None) -> nn.Module:
        """The model that a stage trains; None stands for the recipe's model.

        Raises:
            QatkitError: a factory fails, or the model cannot be shrunk.
        """
        if stage not in self._models:
            self._models[stage] = self._build(stage)
        return self._models[stage]

    def teacher(self, stage: str) -> nn.Module:
        """A stage's teacher model."""
        return self[self.recipe.teacher_of(stage)]

    def _build(self, stage: str | None) -> nn.Module:
        if stage is None:
            return meta_model(self.recipe.model, self.allow)
        if (architecture := self._recorded(stage)) is not None:
            with torch.device("meta"):
                return build_architecture(architecture, self.allow)
        model = starting_model(self.recipe, stage, self._meta_model, self.__getitem__)
        if (block := self.recipe.stages[stage].shrink) is not None:
            with under(f"stages.{stage}.shrink"):
                return shrink.check(block, model)
        return model

    def _meta_model(self, factory: FactoryConfig, key: str) -> nn.Module:
        return meta_model(factory, self.allow, key)
