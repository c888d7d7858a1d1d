"""Check before training whether an export format supports the model that a LightningModule trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from qatkit.errors import under
from qatkit.export.format_row import ExportFormat
from qatkit.schemes import Scheme
from qatkit.tasks.table import TASKS


def check_target(
    target: ExportFormat,
    trainer: Trainer,
    pl_module: LightningModule,
    schemes: Mapping[str, Scheme],
    kv_cache: bool,
    linear_codes: bool,
) -> None:
    """Raise an error if the export format does not support the quantized layers of a module.

    Args:
        target: The format.
        trainer: The Trainer, whose data module may declare the task.
        pl_module: The module, with plain layers.
        schemes: The planned quantization by layer name.
        kv_cache: Whether the KV cache will be quantized.
        linear_codes: Whether the outputs of linear layers will be quantized, too.

    Raises:
        QatkitError: the format does not support the trained model. The message is the same as that of `qatkit
            validate`; layer names are relative to the transformers model, if there is one.
    """
    prefix, model = exported_part(pl_module, list(schemes))
    task = TASKS.get(str(getattr(getattr(trainer, "datamodule", None), "task", None)))
    with under("target"):
        named = {name.removeprefix(prefix): each for name, each in schemes.items()}
        target.check_model(model, named, kv_cache, task, linear_codes)


def exported_part(pl_module: nn.Module, layers: Sequence[str]) -> tuple[str, nn.Module]:
    """Return the transformers model that contains all quantized layers, or the module itself, and its name prefix.

    A LightningModule is not a transformers model; it usually has one as an attribute, and that model is exported.

    Example:
        >>> exported_part(nn.Sequential(nn.Linear(2, 2)), ["0"])[0]
        ''
    """
    for name, part in pl_module.named_modules():
        prefix = f"{name}." if name else ""
        if callable(getattr(part, "save_pretrained", None)) and all(layer.startswith(prefix) for layer in layers):
            return prefix, part
    return "", pl_module
