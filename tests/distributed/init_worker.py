"""Started by test_starting_points.py: GPTQ as the starting point on one process or two."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from qatkit.callbacks import OneShotPruning, QuantizationAwareTraining
from qatkit.callbacks.batches import module_forward
from torch import distributed

from qatkit import QuantSpec
from qatkit.models import mlp
from tests.distributed.worker import Classifier


def diverged_on_one(module: LightningModule, batch: Any) -> object:
    if distributed.get_rank() == 1:
        batch = [batch[0] * float("nan"), *batch[1:]]
    return module_forward(module, batch)


def main(mode: str, out: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Classifier(mlp(in_features=64, hidden=[32]))
    forward = diverged_on_one if mode == "diverged" else module_forward
    callback: Callback = QuantizationAwareTraining(
        weight=QuantSpec(num_bits=3, observer="lsq"), init="gptq", calibration_forward=forward
    )
    if mode == "diverged pruning":
        callback = OneShotPruning("wanda", nm=(2, 4), calibration_forward=diverged_on_one)
    fsdp2 = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=fsdp2 if mode == "fsdp2" else "ddp", max_steps=0, callbacks=[callback],
        use_distributed_sampler=False, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module)
    state = [tensor.detach().clone() for tensor in module.state_dict().values()]
    everywhere: list[list[torch.Tensor]] = [[], []]
    distributed.all_gather_object(everywhere, state)
    if trainer.is_global_zero:
        plain = mlp(in_features=64, hidden=[32])
        changed = not torch.equal(state[0], plain.state_dict()[next(iter(plain.state_dict()))])
        torch.save({"ranks": everywhere, "changed": changed}, out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
