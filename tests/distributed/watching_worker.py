"""Train a small Llama with a NaN on one of two processes, samples and early stopping, and write the weights.

Usage: watching_worker.py OUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from qatkit.callbacks import NonFiniteSteps, TextSamples
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoTokenizer

from qatkit.pipeline.early_stopping import StopEarly
from qatkit.pipeline.module import CompressionModule
from qatkit.pipeline.trainer import DurableCheckpoints
from qatkit.recipe import EarlyStoppingConfig, StageConfig
from tests.data.corpus import save_tokenizer
from tests.distributed.language_worker import Halves
from tests.support.texts import tiny_llama

LOSSES = [3.0, 2.0, 1.0, 5.0, 5.0]
"""What validation is to say after each epoch, which is one step."""


class Ill(CompressionModule):
    """The second process has no loss in its second step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.global_rank == 1 and self.global_step == 1 else loss

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", torch.tensor(LOSSES[self.current_epoch]))

    def on_train_epoch_end(self) -> None:
        states.append(whole(self.model))


def whole(model: torch.nn.Module) -> dict[str, Tensor]:
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value.clone() for name, value in state.items()}


def train(strategy: Any, folder: Path, tokenizer: Any) -> dict[str, Any]:
    states.clear()
    stop = StopEarly(EarlyStoppingConfig(patience=1), "dense", folder)
    samples = TextSamples(2, ["Ada", "Grace counts"], folder / "samples.jsonl", 4, tokenizer)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=len(LOSSES), use_distributed_sampler=False,
        callbacks=[NonFiniteSteps(limit=2), stop, samples], plugins=[DurableCheckpoints()],
        logger=False, num_sanity_val_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Ill(tiny_llama(), StageConfig(max_steps=len(LOSSES), lr=1e-2, schedule="constant"), seed=0)
    trainer.fit(module, datamodule=Halves(4))
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return {"states": list(states), "end": whole(module.model), "record": stop.record(trainer), "samples": rows}


states: list[dict[str, Tensor]] = []


def main(out: Path) -> None:
    torch.set_num_threads(1)
    own = out.parent / f"tokenizer{os.environ.get('LOCAL_RANK', 0)}"
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(own))
    fsdp2 = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    # in one pair of processes: starting them takes most of the time
    found = {name: train(way, out.parent / name, tokenizer) for name, way in (("ddp", "ddp"), ("fsdp2", fsdp2))}
    if distributed.get_rank() == 0:
        torch.save(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
