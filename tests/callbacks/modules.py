"""A LightningModule as users write them, and data it can learn from."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Classifier(LightningModule):
    """Somebody else's module: a network in an attribute, its own loss and optimizer."""

    def __init__(self, net: nn.Module | None = None, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.net = net or network()
        self.weight_decay = weight_decay

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=self.weight_decay)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def batches(count: int = 8, shuffle: bool = False, generator: torch.Generator | None = None) -> DataLoader[Any]:
    x = torch.randn(count * 16, 8, generator=torch.Generator().manual_seed(2))
    y = (x[:, :3]).argmax(dim=1)
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=shuffle, generator=generator)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 8,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **(settings | options))
