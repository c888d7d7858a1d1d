"""What a stage's model is built from where it is no longer the recipe's: written in the stage's record, built again.

A model of transformers is told by its config, any other by the arguments of its factory: a model says with a method
``arguments()`` which of them it would be built with, as those of `qatkit.models.vision` do.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qatkit.errors import QatkitError
from qatkit.recipe import FactoryConfig
from qatkit.recipe.factories import build


@dataclass(frozen=True)
class Architecture:
    """A factory with its arguments, and what differs from the config of the model that it makes."""

    model: FactoryConfig
    config: dict[str, Any] = field(default_factory=dict)
    """Attributes of a config of transformers and their values, as JSON holds them."""

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Architecture:
        """Out of what `dataclasses.asdict` made of one."""
        return cls(FactoryConfig(**plain["model"]), dict(plain["config"]))


def build_architecture(architecture: Architecture, allow: Sequence[str] = (), key: str = "model") -> nn.Module:
    """The model, with the values that its factory gives it; random ones where its config differs from the factory's.

    Args:
        architecture: From `architecture_of`, or just a factory.
        allow: Packages besides qatkit's factories that may be named.
        key: Dotted key of the factory in the recipe, for errors.
    """
    if not architecture.config:
        return _module(build(architecture.model, key, allow), architecture.model, key)
    like: Any = meta_model(architecture.model, allow, key)  # no weight is read only to be thrown away
    config = copy.deepcopy(like.config)
    for name, value in architecture.config.items():
        setattr(config, name, value)
    before = torch.get_default_dtype()
    torch.set_default_dtype(like.dtype)  # a cast of the whole model would round the rotary frequencies too
    try:
        model: Any = type(like)(config)
    finally:
        torch.set_default_dtype(before)
    if any(getattr(module, "gradient_checkpointing", False) for module in like.modules()):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return _module(model, architecture.model, key)


def architecture_of(model: nn.Module, start: Architecture, allow: Sequence[str] = ()) -> Architecture:
    """What a changed model is built from.

    Args:
        model: The model, with plain layers.
        start: What it was built from before it was changed.
        allow: Packages besides qatkit's factories that may be named.

    Raises:
        QatkitError: the model does not say it, or what is built would have other weights.
    """
    config, arguments = getattr(model, "config", None), getattr(model, "arguments", None)
    if hasattr(config, "to_dict"):
        assert config is not None
        before, after = meta_model(start.model, allow).config.to_dict(), config.to_dict()  # type: ignore[operator, union-attr]  # models of transformers have one
        found = Architecture(
            start.model,
            json.loads(json.dumps({key: value for key, value in after.items() if before.get(key) != value})),
        )
    elif callable(arguments):
        found = Architecture(FactoryConfig(start.model.factory, start.model.args | arguments()))
    else:
        raise QatkitError(
            f"model: {type(model).__name__} has neither a config of transformers nor a method arguments(), so its "
            "changed sizes cannot be written down; add def arguments(self) -> dict: the arguments that "
            f"{start.model.factory} makes its like from"
        )
    with torch.device("meta"):
        again = build_architecture(found, allow)
    shapes, built = ({key: list(value.shape) for key, value in part.state_dict().items()} for part in (model, again))
    for key in shapes | built:
        if shapes.get(key) != built.get(key):
            raise QatkitError(
                f"model: {type(model).__name__}, built again from {found.config or found.model.args}, has '{key}' of "
                f"shape {built.get(key)} instead of {shapes.get(key)}; it cannot be written down"
            )
    return found


def meta_model(config: FactoryConfig, allow: Sequence[str] = (), key: str = "model") -> nn.Module:
    """A factory's model with shapes and names but without values.

    Raises:
        QatkitError: the factory fails, or what it returns is no module.
    """
    try:
        with torch.device("meta"):
            model = build(config, key, allow)
    except QatkitError:
        raise
    except Exception as error:  # a factory may raise anything
        said = f"{type(error).__name__}: {error}"
        raise QatkitError(
            f"{key}.factory: '{config.factory}' fails on torch's meta device ({said[:300]}); "
            "it must build a model without reading the values of its weights"
        ) from error
    return _module(model, config, key)


def _module(model: object, config: FactoryConfig, key: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise QatkitError(f"{key}.factory: '{config.factory}' returned {kind}; it must return an nn.Module")
    return model
