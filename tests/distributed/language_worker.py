"""Take one optimizer step of a small Llama on two processes with different numbers of labels; write gradients.

Usage: language_worker.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from qatkit.pipeline.module import CompressionModule
from qatkit.recipe import StageConfig
from tests.support.texts import loader, tiny_llama


class PlainDescent(CompressionModule):
    """One step with learning rate 1: the change of the weights is the gradient."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Halves(LightningDataModule):
    """The first process trains on rows 0 to 3, the second on rows 4 to 7; both validate on all."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return loader(self.batch_size, range(4 * distributed.get_rank(), 4 * distributed.get_rank() + 4))

    def val_dataloader(self) -> Any:
        return loader(3)


def step(strategy: Any, accumulate: int) -> dict[str, Any]:
    model = tiny_llama()
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=1, accumulate_grad_batches=accumulate,
        use_distributed_sampler=False, logger=False, num_sanity_val_steps=0, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(PlainDescent(model, StageConfig(max_steps=1), seed=0), datamodule=Halves(4 // accumulate))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    gradients = {name: before[name] - value for name, value in state.items()}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"gradients": gradients, "metrics": metrics, "state": state}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    fsdp2 = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    # in one pair of processes: starting them takes most of the time
    found = {"ddp": step("ddp", 1), "ddp, accumulated": step("ddp", 2), "fsdp2, accumulated": step(fsdp2, 2)}
    if distributed.get_rank() == 0:
        torch.save(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
