"""The ``lora`` block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qatkit.common.device import device_type
from qatkit.errors import QatkitError
from qatkit.lora.adapter_files import save_adapter
from qatkit.lora.attachment import (
    Adapter,
    adapted_layers,
    attach,
    base_layers,
    check_inside,
    merge,
    target_layers,
)
from qatkit.lora.bits import check_backend
from qatkit.recipe import LoraConfig, StageConfig, TrainerConfig
from qatkit.stages import quantize
from qatkit.stages.layer_names import inside

if TYPE_CHECKING:
    from qatkit.callbacks import LoRA


def check(config: LoraConfig, stage: StageConfig, trainer: TrainerConfig, model: nn.Module) -> list[str]:
    """Check the block against the model, and return the layers for adapters."""
    names = target_layers(model, config.targets)
    if stage.quantize is not None and set(names) & set(quantize.check(stage.quantize, model).quantized):
        check_inside({name: model.get_submodule(name) for name in names}, _adapter(config), held=False)
    if config.bits is not None:
        if not base_layers(model):
            raise QatkitError(
                f"the model has no plain linear layer to quantize to {config.bits} bits",
                key="bits",
                advice="remove bits",
            )
        check_backend(torch.device(device_type(trainer.accelerator)))
    return names


def callback(config: LoraConfig, held: Sequence[str], seed: int) -> LoRA:
    """Return the callback that freezes the model and trains adapters; layers in `held` keep their zeros."""
    from qatkit.callbacks import LoRA

    return LoRA(
        config.rank,
        config.alpha,
        config.dropout,
        inside(config.targets),
        config.dora,
        config.bits,  # type: ignore[arg-type]  # 4 or 8
        config.quant_type,
        config.double_quant,
        inside(held),
        seed,
    )


def attach_to(model: nn.Module, config: LoraConfig, held: Sequence[str]) -> None:
    """Attach adapters to a plain or prepared model, before trained values are loaded into it."""
    names = target_layers(model, config.targets)
    attach(model, names, _adapter(config), set(held) & set(names))


def finish(model: nn.Module, moved: bool, original: bool, folder: Path, device: torch.device) -> None:
    """Merge the adapters of a trained model, and save them in the stage's folder if peft can use them.

    Args:
        model: The model with adapters.
        moved: Whether the weights under the adapters differ from the weights of the stage's input model, to which peft
            adds the update.
        original: Whether the stage's input is the model named in its config. If not, the adapters are saved without a
            base model name, because peft would otherwise load the wrong base model.
        folder: The stage's folder.
        device: The device on which the updates were added to the weights in training.
    """
    if not moved and not any(getattr(layer, "held", False) for layer in adapted_layers(model).values()):
        base = getattr(getattr(model, "config", None), "_name_or_path", "") if original else ""
        save_adapter(model, folder / "adapter", base)
    merge(model, device)


def _adapter(config: LoraConfig) -> Adapter:
    return Adapter(config.rank, config.alpha, config.dropout, config.dora)
