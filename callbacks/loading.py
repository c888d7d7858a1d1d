"""Bring a module back from a Lightning checkpoint with the quantization it was trained with."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule

from qatkit.errors import QatkitError
from qatkit.quantization.folding import replay_folds
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.state import prepare_from_specs

Module = TypeVar("Module", bound=LightningModule)


def load_quantized(module: Module, checkpoint: Path | str) -> Module:
    """Prepare a freshly made module as a checkpoint's callbacks had prepared theirs, and load its weights and scales.

    Lightning's own ``load_from_checkpoint(path, strict=False)`` gives the unquantized module with the latent weights,
    where no BatchNorm was folded.

    Args:
        module: A new module of the same architecture; changed in place.
        checkpoint: What a Trainer with `QuantizationAwareTraining` saved.

    Returns:
        The module.

    Raises:
        QatkitError: the checkpoint was saved without `QuantizationAwareTraining`.

    Example:
        >>> load_quantized(MyModule(), "last.ckpt")  # doctest: +SKIP
    """
    try:
        content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise QatkitError(
            f"{checkpoint}: it holds objects beside tensors and plain values (saved hyperparameters, say), which "
            "are not unpickled from a file; name trusted types with torch.serialization.add_safe_globals first"
        ) from error
    states = [state for state in content.get("callbacks", {}).values() if {"folds", "specs"} <= set(state)]
    if not states:
        raise QatkitError(f"{checkpoint}: it holds no quantized layers; load it with load_from_checkpoint")
    if any(isinstance(part, FakeQuantize) for part in module.modules()):
        raise QatkitError("load_quantized: the module is quantized already; give a freshly made one")
    for state in states:
        replay_folds(module, state["folds"])
        prepare_from_specs(module, state["specs"])
    module.load_state_dict(content["state_dict"])
    return module
