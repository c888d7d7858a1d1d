"""The ``lora`` block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qatkit.common.device import device_type
from qatkit.errors import QatkitError
from qatkit.lora.attach import (
    Adapter,
    adapted_layers,
    attach,
    base_layers,
    check_inside,
    merge,
    save_adapter,
    target_layers,
)
from qatkit.lora.bits import check_backend
from qatkit.recipe import LoraConfig, StageConfig, TrainerConfig
from qatkit.stages import quantize
from qatkit.stages.layer_names import inside

if TYPE_CHECKING:
    from qatkit.callbacks import LoRA


def check(config: LoraConfig, stage: StageConfig, trainer: TrainerConfig, model: nn.Module) -> list[str]:
    """The layers that are adapted, after everything that can be known of them was checked."""
    names = target_layers(model, config.targets)
    if stage.quantize is not None and set(names) & set(quantize.check(stage.quantize, model)):
        check_inside({name: model.get_submodule(name) for name in names}, _adapter(config), held=False)
    if config.bits is not None:
        if not base_layers(model):
            raise QatkitError(f"bits: the model has no plain linear layer to hold in {config.bits} bits; leave it out")
        check_backend(torch.device(device_type(trainer.accelerator)))
    return names


def callback(config: LoraConfig, held: Sequence[str], seed: int) -> LoRA:
    """What freezes the model and trains adapters; the zeros of the layers `held` stay."""
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
    """Put adapters on a plain or prepared model outside of training, where trained values are about to be loaded."""
    names = target_layers(model, config.targets)
    attach(model, names, _adapter(config), set(held) & set(names))


def finish(model: nn.Module, moved: bool, original: bool, folder: Path, device: torch.device) -> None:
    """Save the adapters of a trained model beside the stage, where peft can use them, and merge them.

    Args:
        model: The model with its adapters.
        moved: The weights below them are not those of the stage's input, which is what peft would add the update to.
        original: That input is the model which the name in the config stands for; if not, the adapters name no base, as
            peft would load that one.
        folder: The stage's folder.
        device: Where training computed updates that are part of a weight.
    """
    if not moved and not any(getattr(layer, "held", False) for layer in adapted_layers(model).values()):
        base = getattr(getattr(model, "config", None), "_name_or_path", "") if original else ""
        save_adapter(model, folder / "adapter", base)
    merge(model, device)


def _adapter(config: LoraConfig) -> Adapter:
    return Adapter(config.rank, config.alpha, config.dropout, config.dora)
