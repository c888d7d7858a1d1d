"""The architecture of a model that differs from the recipe's, which is recorded with its stage.

A transformers model is described by its config. Any other model is described by the arguments of its factory: its
method ``arguments()`` returns the arguments that build a model of its size, as in `qatkit.models.vision`.
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
    """A factory with its arguments, and the changes to the config of its model."""

    model: FactoryConfig
    config: dict[str, Any] = field(default_factory=dict)
    """Changed attributes of a transformers config, with JSON values."""

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Architecture:
        """Create an architecture from the dictionary returned by `dataclasses.asdict`."""
        return cls(FactoryConfig(**plain["model"]), dict(plain["config"]))


def build_architecture(architecture: Architecture, allow: Sequence[str] = (), key: str = "model") -> nn.Module:
    """Build a model with its factory's weights, or with random weights if its config differs from the factory's.

    Args:
        architecture: The result of `architecture_of`, or a factory without changes.
        allow: Packages, in addition to qatkit, whose factories may be used.
        key: The dotted key of the factory in the recipe, for errors.
    """
    if not architecture.config:
        return _module(build(architecture.model, key, allow), architecture.model, key)
    like: Any = meta_model(architecture.model, allow, key)  # reads no weight only to discard it
    config = copy.deepcopy(like.config)
    for name, value in architecture.config.items():
        setattr(config, name, value)
    before = torch.get_default_dtype()
    torch.set_default_dtype(like.dtype)  # casting the model would also round its rotary frequencies
    try:
        model: Any = type(like)(config)
    finally:
        torch.set_default_dtype(before)
    if any(getattr(module, "gradient_checkpointing", False) for module in like.modules()):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return _module(model, architecture.model, key)


def architecture_of(model: nn.Module, start: Architecture, allow: Sequence[str] = ()) -> Architecture:
    """Return the architecture of a model whose sizes have changed.

    Args:
        model: The model, with plain layers.
        start: Its architecture before the change.
        allow: Packages, in addition to qatkit, whose factories may be used.

    Raises:
        QatkitError: the model does not describe its sizes, or a model built from the description has different weights.
    """
    config, arguments = getattr(model, "config", None), getattr(model, "arguments", None)
    if hasattr(config, "to_dict"):
        assert config is not None
        before, after = meta_model(start.model, allow).config.to_dict(), config.to_dict()  # type: ignore[operator, union-attr]  # transformers models have one
        architecture = Architecture(
            start.model,
            json.loads(json.dumps({key: value for key, value in after.items() if before.get(key) != value})),
        )
    elif callable(arguments):
        architecture = Architecture(FactoryConfig(start.model.factory, start.model.args | arguments()))
    else:
        raise QatkitError(
            f"{type(model).__name__} has neither a transformers config nor an arguments() method, so its changed "
            "sizes cannot be recorded",
            key="model",
            advice=f"add a method arguments(self) -> dict that returns the {start.model.factory} arguments for a "
            "model of this size",
        )
    with torch.device("meta"):
        again = build_architecture(architecture, allow)
    shapes, built = ({key: list(value.shape) for key, value in part.state_dict().items()} for part in (model, again))
    for key in shapes | built:
        if shapes.get(key) != built.get(key):
            raise QatkitError(
                f"{type(model).__name__}, rebuilt from {architecture.config or architecture.model.args}, has "
                f"'{key}' of shape {built.get(key)} instead of {shapes.get(key)}, so it cannot be recorded",
                key="model",
            )
    return architecture


def meta_model(config: FactoryConfig, allow: Sequence[str] = (), key: str = "model") -> nn.Module:
    """Build a factory's model on torch's meta device, with names and shapes but without values.

    Raises:
        QatkitError: the factory fails, or does not return a module.
    """
    try:
        with torch.device("meta"):
            model = build(config, key, allow)
    except QatkitError:
        raise
    except Exception as error:  # a factory may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise QatkitError(
            f"'{config.factory}' fails on torch's meta device ({reason[:300]})",
            key=f"{key}.factory",
            advice="build the model without reading weight values",
        ) from error
    return _module(model, config, key)


def _module(model: object, config: FactoryConfig, key: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise QatkitError(
            f"'{config.factory}' returned {type(model).__name__}", key=f"{key}.factory", advice="return an nn.Module"
        )
    return model
