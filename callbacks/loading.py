"""Load a module from a Lightning checkpoint with the quantization used in training."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from qatkit.callbacks.quantization import QUANTIZED

from qatkit.errors import QatkitError
from qatkit.quantization.folding import replay_folds
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.placement.points import Placement
from qatkit.quantization.state import prepare_from_specs

Module = TypeVar("Module", bound=LightningModule)


def load_quantized(module: Module, checkpoint: Path | str) -> Module:
    """Quantize a new module as recorded in a checkpoint, and load the checkpoint's weights and scales.

    Lightning's own ``load_from_checkpoint`` does not handle quantized layers: it fails because of the scales, and with
    ``strict=False`` it returns the module without quantization.

    A checkpoint of a module compiled with `torch.compile`, as a whole or in part, loads into a compiled or an
    uncompiled module.

    Args:
        module: A new module of the same architecture; changed in place.
        checkpoint: A checkpoint saved by a Trainer with `QuantizationAwareTraining`.

    Returns:
        The module.

    Raises:
        QatkitError: the checkpoint was saved without `QuantizationAwareTraining`.

    Example:
        >>> # needs a checkpoint of a trained module
        >>> load_quantized(MyModule(), "last.ckpt")  # doctest: +SKIP
    """
    try:
        content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise QatkitError(
            "the checkpoint contains objects other than tensors and plain values (for example, saved hyperparameters), "
            "and qatkit does not unpickle them",
            key=str(checkpoint),
            advice="register the types that you trust with torch.serialization.add_safe_globals",
        ) from error
    states = [state for state in content.get("callbacks", {}).values() if {"folds", "specs"} <= set(state)]
    if not states:
        raise QatkitError(
            "the checkpoint has no quantized layers",
            key=str(checkpoint),
            advice="load the checkpoint with load_from_checkpoint",
        )
    if any(isinstance(part, FakeQuantize) for part in module.modules()):
        raise QatkitError("the module is already quantized", key="module", advice="pass a new module")
    names: dict[str, str] = {_plain(name): name for name, _ in module.named_modules()}

    def own(name: str) -> str:
        return names.get(_plain(name), name)

    for state in states:
        replay_folds(module, [(own(one), own(other)) for one, other in state["folds"]])
        placement = Placement.from_dict(state["placement"]).renamed(own)
        prepare_from_specs(module, {own(name): spec for name, spec in state["specs"].items()}, placement)
    content["state_dict"].pop(QUANTIZED, None)
    keys = {_plain(key): key for key in module.state_dict()}
    module.load_state_dict({keys.get(_plain(key), key): value for key, value in content["state_dict"].items()})
    return module


def _plain(name: str) -> str:
    """Remove the prefix that `torch.compile` adds to the names of a module and its weights."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
