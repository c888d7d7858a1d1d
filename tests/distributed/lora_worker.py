"""Train adapters on one process or two on the same samples, and write the merged weights.

Usage: lora_worker.py single|two OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from qatkit.callbacks import LoRA, QuantizationAwareTraining
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qatkit import QuantSpec, prepare_qat
from qatkit.lora.attachment import Adapter, attach, merge, to_full_precision

STEPS, BATCH, NAMES = 6, 16, ["0", "2"]
SPEC = QuantSpec(4, strategy="group", group_size=16, observer="lsq")


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train_dataloader(self) -> DataLoader[Any]:
        """Rank r takes every second batch; one process takes them all in the same order, two per step."""
        world, rank = (2, self.trainer.global_rank) if self.trainer.world_size == 2 else (1, 0)
        x = torch.randn(2 * STEPS * BATCH, 32, generator=torch.Generator().manual_seed(2))
        rows = torch.arange(2 * STEPS * BATCH).view(-1, BATCH)[rank::world].flatten()
        return DataLoader(TensorDataset(x[rows], x[rows, :8].argmax(dim=1)), batch_size=BATCH)


def train(kind: str, strategy: Any, devices: int) -> dict[str, Tensor]:
    """The merged weights, as the pipeline makes them: from the whole state, in a fresh model."""
    module = Classifier()
    quantize = kind == "qat"
    callbacks = [QuantizationAwareTraining(SPEC)] if quantize else []
    held = ["model.0"] if kind == "sparse" else []
    if held:
        module.model[0].weight.data[:, ::2] = 0
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=STEPS,
        accumulate_grad_batches=1 if devices == 2 else 2,
        callbacks=[*callbacks, LoRA(4, 8, bits=4 if kind == "qlora" else None, held=held, dora=kind == "dora")],
        use_distributed_sampler=False, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module)
    if kind == "qlora":
        to_full_precision(module.model)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(module.model, options=whole)
    if not trainer.is_global_zero:
        return {}
    model = network()
    if quantize:
        prepare_qat(model, SPEC)
    attach(model, NAMES, Adapter(4, 8, dora=kind == "dora"), NAMES[:1] if held else ())
    model.load_state_dict(state)
    merge(model)
    return model.state_dict()


def main(mode: str, out: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for kind in ("lora", "dora", "qat", "sparse", "qlora"):
        if mode == "single":
            found[kind] = train(kind, "auto", 1)
            continue
        # all in one pair of processes: starting them takes most of the time
        found[f"{kind} ddp"] = train(kind, "ddp", 2)
        if kind != "qlora":  # refused, see tests/callbacks/test_lora.py
            fsdp2 = ModelParallelStrategy(
                data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
            )
            found[f"{kind} fsdp2"] = train(kind, fsdp2, 2)
    if found["lora" if mode == "single" else "lora ddp"]:
        torch.save(found, out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
