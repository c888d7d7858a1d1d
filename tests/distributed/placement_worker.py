"""Train a residual network for ONNX Runtime on one process or two, and write the state.

Usage: placement_worker.py single|ddp|fsdp2 OBSERVER OUT
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from qatkit.callbacks import QuantizationAwareTraining
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qatkit import QuantSpec
from qatkit.data import digits
from qatkit.models import resnet

STEPS, BATCH = 6, 8


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = resnet((4, 8))

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            for block in self.model[1]:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: Tensor) -> Any:
        return self.model(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        """Rank r takes every second batch; one process takes them all in the same order, two per step."""
        train = digits().train
        assert isinstance(train, TensorDataset)
        world, rank = (2, self.trainer.global_rank) if self.trainer.world_size == 2 else (1, 0)
        rows = torch.arange(2 * STEPS * BATCH).view(-1, BATCH)[rank::world].flatten()
        return DataLoader(TensorDataset(*(t[rows] for t in train.tensors)), batch_size=BATCH)


def main(mode: str, observer: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Classifier()
    activation = QuantSpec(8, symmetric=False, strategy="tensor", observer=observer)
    quantization = QuantizationAwareTraining(
        weight=QuantSpec(7, observer="lsq"), activation=activation, target="onnxruntime",
        calibration_batches=2 if mode == "single" else 1,
    )  # fmt: skip
    strategy: Any = {"single": "auto", "ddp": "ddp"}.get(mode) or ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
    )
    trainer = Trainer(
        accelerator="cpu", devices=1 if mode == "single" else 2, strategy=strategy, max_steps=STEPS, logger=False,
        accumulate_grad_batches=2 if mode == "single" else 1, enable_checkpointing=False, enable_progress_bar=False,
        use_distributed_sampler=False, callbacks=[quantization], enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(module.model, options=options)
    if trainer.is_global_zero:
        points = [f"{point.module}.{point.part}" for point in quantization.placement.points]
        torch.save({"state": {key: value.clone() for key, value in state.items()}, "points": points}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
