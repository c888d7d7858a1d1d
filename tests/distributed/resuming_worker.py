"""Train with FSDP2 on two processes: without a stop, from a checkpoint, and up to a validation; write the results.

Usage: resuming_worker.py OUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from qatkit.callbacks import QuantizationAwareTraining
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qatkit import QuantSpec


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]

    def forward(self, x: Tensor) -> Any:
        return self.model(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader[Any]:
        torch.manual_seed(1)
        return DataLoader(TensorDataset(torch.randn(32, 8), torch.randint(4, (32,))), batch_size=8)


def fit(epochs: int, folder: Path, resume: bool = False, save: bool = False) -> dict[str, Any]:
    activation = QuantSpec(symmetric=False, strategy="tensor")
    qat = QuantizationAwareTraining(weight=QuantSpec(num_bits=4, observer="lsq"), activation=activation)
    trainer = Trainer(
        accelerator="cpu", devices=2, max_epochs=epochs, callbacks=[qat], use_distributed_sampler=False, logger=False,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Classifier()
    trainer.fit(module, ckpt_path=str(folder / "half.ckpt") if resume else None)
    if save:
        trainer.save_checkpoint(folder / "half.ckpt")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {"state": get_model_state_dict(module.model, options=options), "steps": trainer.global_step}


def validated() -> dict[str, Any]:
    """Running statistics on each process after an epoch of different batches that ends with a validation."""
    from qatkit.pipeline.module import CompressionModule
    from qatkit.recipe import StageConfig

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    trainer = Trainer(
        accelerator="cpu", devices=2, max_epochs=1, use_distributed_sampler=False, logger=False,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))
    rows = [(torch.randn(8), torch.tensor(index % 4)) for index in range(32)]
    data = DataLoader(rows, batch_size=8)  # type: ignore[arg-type]  # a list is a dataset
    trainer.fit(CompressionModule(model, StageConfig(max_steps=4, batch_size=8), seed=0), data, data)
    means: list[Any] = [None, None]
    torch.distributed.all_gather_object(means, model[1].running_mean)
    return {"first": means[0], "second": means[1]}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    found = {"whole": fit(4, out.parent), "half": fit(2, out.parent, save=True), "resumed": fit(4, out.parent, True)}
    found["validated"] = validated()
    if found["whole"]["state"]:  # the first process has the full state
        torch.save(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
