"""Build timm and torchvision models by name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qatkit.errors import QatkitError, did_you_mean


def timm_model(name: str, num_classes: int = 1000, in_channels: int = 3, weights: str | None = None) -> nn.Module:
    """Build a timm image model, such as "resnet18", "mobilenetv3_small_100" or "vit_tiny_patch16_224".

    No files are downloaded; weights are random unless `weights` is set.

    Args:
        name: A name from ``timm.list_models()``.
        num_classes: Number of outputs; 0 returns features.
        in_channels: Channels of the image.
        weights: A ``.safetensors`` file with the state dict of this model.

    Raises:
        QatkitError: timm is not installed, the model does not exist, or the weights do not match the model.
    """
    timm = _package("timm")
    if not timm.is_model(name):
        raise QatkitError(f"timm has no model '{name}'", key="name", advice=did_you_mean(name, timm.list_models()))
    model = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)
    return _filled(model, weights)


def torchvision_model(name: str, num_classes: int = 1000, weights: str | None = None) -> nn.Module:
    """Build a torchvision model, such as "resnet18", "convnext_tiny" or "swin_t".

    No files are downloaded; weights are random unless `weights` is set.

    Args:
        name: A name from ``torchvision.models.list_models()``.
        num_classes: Number of outputs.
        weights: A ``.safetensors`` file with the state dict of this model.

    Raises:
        QatkitError: torchvision is not installed, the model does not exist, or the weights do not match the model.
    """
    models = _package("torchvision").models
    if name not in models.list_models():
        raise QatkitError(
            f"torchvision has no model '{name}'", key="name", advice=did_you_mean(name, models.list_models())
        )
    composed = [each for part in (models.detection, models.segmentation) for each in models.list_models(module=part)]
    backbone = {"weights_backbone": None} if name in composed else {}  # by default, these are downloaded
    return _filled(models.get_model(name, weights=None, num_classes=num_classes, **backbone), weights)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError beside another build of torch
        missing = isinstance(error, ModuleNotFoundError)
        raise QatkitError(
            f"{name} is not installed" if missing else f"{name} cannot be imported ({error})",
            key="factory",
            advice=f"run: pip install {name}"
            if missing
            else "install the torchvision version that matches the installed torch",
        ) from error


def _filled(model: nn.Module, weights: str | None) -> nn.Module:
    if weights is None or torch.get_default_device().type == "meta":
        return model
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(Path(weights).expanduser()))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise QatkitError(
            f"{weights} does not contain the weights of this model ({' '.join(str(error).split())[:300]})",
            key="weights",
            advice="use a .safetensors file with its state dict",
        ) from error
    return model
