"""The LightningModule that the pipeline trains: a model, its loss, its optimizer and how it is sharded."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from qatkit.quantization.modules import FakeQuantize
from qatkit.recipe import StageConfig

SCALE_LR = 0.2
"""Learned scales move at this share of the learning rate: a step of Adam is as large as the learning rate whatever the
gradient, and scales are several times smaller than weights."""


class CompressionModule(LightningModule):
    """A classifier in one stage of a recipe.

    Batches are ``(inputs, labels)``; the loss is cross-entropy.

    Args:
        model: The model to train.
        stage: Learning rate, schedule and length.
        seed: Random numbers of an epoch depend on it, the epoch and the rank alone, so that a resumed run repeats them.
    """

    def __init__(self, model: nn.Module, stage: StageConfig, seed: int) -> None:
        super().__init__()
        self.model = model
        self.stage = stage
        self.seed = seed

    @override
    def configure_model(self) -> None:
        if self.device_mesh is not None:
            parallelize(self.model, self.device_mesh)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]  # nn.Module is untyped

    @override
    def on_train_epoch_start(self) -> None:
        torch.manual_seed(hash((self.seed, self.current_epoch, self.global_rank)) % 2**63)
        # Lightning 2.6 counts one epoch too far after resuming from a checkpoint of an epoch's end, and would shuffle
        # otherwise than the uninterrupted run does; the data are only read after this hook
        sampler = getattr(self.trainer.train_dataloader, "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.current_epoch)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = F.cross_entropy(self(inputs), labels)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        inputs, labels = batch
        logits = self(inputs)
        accuracy = (logits.argmax(dim=-1) == labels).float().mean()
        values = {"val/loss": F.cross_entropy(logits, labels), "val/accuracy": accuracy}
        self.log_dict(values, prog_bar=True, batch_size=len(labels), sync_dist=True)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(parameter_groups(self.model, self.stage.lr, self.stage.weight_decay))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: lr_factor(step / max(self.stage.max_steps, 1), self.stage.schedule, self.stage.warmup),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: matrices with weight decay, vectors without, learned scales without and slower.

    Example:
        >>> groups = parameter_groups(nn.Linear(4, 2), lr=1e-3, weight_decay=0.01)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.01), (1, 0.0)]
    """
    scales = {
        id(module.scale)
        for module in model.modules()
        if isinstance(module, FakeQuantize) and isinstance(module.scale, nn.Parameter)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = [parameter for parameter in trained if id(parameter) not in scales]
    groups = [
        {"params": [p for p in weights if p.dim() >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in weights if p.dim() < 2], "lr": lr, "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in scales], "lr": lr * SCALE_LR, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def lr_factor(progress: float, schedule: Literal["cosine", "linear", "constant"], warmup: float = 0.0) -> float:
    """Share of the peak learning rate at a point of the stage.

    Args:
        progress: How much of the stage is done, 0 to 1.
        schedule: What follows the warm-up: half a cosine to 0, a line to 0, or the peak.
        warmup: Share of the stage over which the rate rises from 0.

    Example:
        >>> lr_factor(0.5, "cosine")
        0.5
    """
    if progress < warmup:
        return progress / warmup
    rest = min((progress - warmup) / (1 - warmup), 1.0) if warmup < 1 else 1.0
    if schedule == "cosine":
        return round(0.5 * (1 + math.cos(math.pi * rest)), 12)
    return 1 - rest if schedule == "linear" else 1.0


def parallelize(model: nn.Module, mesh: Any) -> None:
    """Shard a model's parameters over the data-parallel processes with FSDP2, in place.

    Fake quantizers are in the model by now (callbacks swap in `setup`), so their scales are sharded with the weights.
    """
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=mesh["data_parallel"])
