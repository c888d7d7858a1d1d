"""Train a small Llama on texts that it generates, on two processes whose texts end at different positions.

Usage: generation_worker.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from qatkit.callbacks import Generation, KnowledgeDistillation
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader

from tests.support.texts import VOCAB, tiny_llama


class Writer(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_llama()
        self.seen: list[Tensor] = []

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        self.seen.append(batch["labels"])
        return self.net(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        words = torch.randint(1, VOCAB, (16, 12), generator=torch.Generator().manual_seed(1))
        return DataLoader([{"input_ids": row, "labels": row} for row in words], batch_size=2)  # type: ignore[arg-type]


def fit(strategy: Any) -> dict[str, Any]:
    # most texts end soon, each after a number of tokens of its own: one process is done long before the other
    own = Generation(0.5, prompt=4, new_tokens=8, eos=list(range(200, VOCAB)), seed=1)
    module = Writer()
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=8, use_distributed_sampler=False, logger=False,
        callbacks=[KnowledgeDistillation(tiny_llama(), student="net", on_policy=own)], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module)
    state = get_model_state_dict(module.net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    seen: list[Any] = [None, None]
    distributed.all_gather_object(seen, module.seen)
    return {"seen": seen, "state": state}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    fsdp2 = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    found = {"ddp": fit("ddp"), "fsdp2": fit(fsdp2)}  # in one pair of processes: starting them takes most of the time
    if distributed.get_rank() == 0:
        torch.save(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
