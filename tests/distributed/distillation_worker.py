"""Train a small network with every part of distillation on one process or two, and write the results.

Usage: distillation_worker.py single|ddp|whole|fsdp2 OUT; "whole" is one process without learned maps, like fsdp2
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from qatkit.callbacks import KnowledgeDistillation, QuantizationAwareTraining
from qatkit.callbacks.features import HiddenMatch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qatkit import QuantSpec

STEPS, BATCH = 8, 16


def network(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = network(16, 1)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1], ignore_index=-100)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader[Any]:
        """Rank r takes every second batch; one process takes them all in the same order, two per step."""
        world, rank = (2, self.trainer.global_rank) if self.trainer.world_size == 2 else (1, 0)
        x = torch.randn(2 * STEPS * BATCH, 8, generator=torch.Generator().manual_seed(2))
        y = x[:, :4].argmax(dim=1)
        y[::5] = -100
        y[:BATCH] = -100  # in the first step one process has nothing that counts, and must not leave the other waiting
        rows = torch.arange(2 * STEPS * BATCH).view(-1, BATCH)[rank::world].flatten()
        return DataLoader(TensorDataset(x[rows], y[rows]), batch_size=BATCH)


def main(mode: str, out: Path) -> None:
    torch.set_num_threads(1)
    module = Classifier()
    # learned maps beside sharded weights are refused
    mapped = mode in ("single", "ddp")
    hidden = HiddenMatch({"1": "1"}, widths=(16, 24) if mapped else None)
    teacher = network(24 if mapped else 16, 3)
    distillation = KnowledgeDistillation(
        teacher, temperature=2.0, alpha=1.0, student="model", loss="jsd", hidden=hidden, ramp=0.5
    )
    quantization = QuantizationAwareTraining(weight=QuantSpec(num_bits=4, observer="lsq"))
    fsdp2 = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if mode in ("single", "whole") else 2,
        strategy={"ddp": "ddp", "fsdp2": fsdp2}.get(mode, "auto"),
        max_steps=STEPS,
        accumulate_grad_batches=2 if mode in ("single", "whole") else 1,
        callbacks=[quantization, distillation],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    state = get_model_state_dict(module.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if trainer.is_global_zero:
        projections = distillation.features.projections
        maps = {} if projections is None else dict(projections.state_dict())
        torch.save({"state": state, "maps": maps}, out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
