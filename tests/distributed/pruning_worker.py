"""Prune a small network during training on one process or two, stop, resume, and write the results.

Usage: pruning_worker.py single|ddp|fsdp2 OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from qatkit.callbacks.movement import MovementPruning
from qatkit.callbacks.pruning import ConstantPruning, MagnitudePruning
from qatkit.callbacks.rewinding import WeightRewinding
from qatkit.callbacks.srste import SparseRefinedSTE
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qatkit.pruning.schedule import Ramp

STEPS, BATCH = 12, 16
PRUNINGS: dict[str, dict[str, Any]] = {
    "layer": {"sparsity": 0.5},
    "model": {"ramp": Ramp(0.7, initial=0.1), "scope": "model"},
    "nm": {"nm": (2, 4)},
    "movement": {"ramp": Ramp(0.6, start=0.2, end=0.9), "scope": "model"},
    "block": {"sparsity": 0.5, "block": (4, 4), "exclude": ["model.4"]},
    "srste": {"nm": (2, 4), "decay": 0.05},
    "rewind": {"sparsity": 0.5, "scope": "model"},
}
KINDS: dict[str, Any] = {"movement": MovementPruning, "srste": SparseRefinedSTE}


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        # two processes share 3 rows unequally, and 20 and 36 rows in the middle of a block
        self.model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 36), nn.ReLU(), nn.Linear(36, 3))
        with torch.no_grad():
            for layer in (self.model[0], self.model[2]):
                layer.weight.copy_((layer.weight * 20).round() / 20)  # many weights tie

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        """Rank r takes every second batch; one process takes them all in the same order, two per step."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(STEPS * BATCH, 8, generator=generator)  # two epochs of this make all steps
        world, rank = (2, self.trainer.global_rank) if self.trainer.world_size == 2 else (1, 0)
        rows = torch.arange(STEPS * BATCH).view(-1, BATCH)[rank::world].flatten()
        return DataLoader(TensorDataset(x[rows], x[rows][:, :3].argmax(dim=1)), batch_size=BATCH)


def fit(mode: str, callbacks: Any, folder: Path, epochs: int, checkpoint: Path | None = None) -> dict[str, Tensor]:
    module = Classifier()
    # the strategy's own defaults would make it tensor-parallel and leave every process with its own gradients
    fsdp2 = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if mode == "single" else 2,
        strategy={"single": "auto", "ddp": "ddp", "fsdp2": fsdp2}[mode],
        max_epochs=epochs,
        accumulate_grad_batches=2 if mode == "single" else 1,
        callbacks=[*callbacks, ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)],
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=checkpoint)
    return get_model_state_dict(module.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def main(mode: str, out: Path) -> None:
    torch.set_num_threads(1)
    content: dict[str, Any] = {}
    for name, options in PRUNINGS.items():
        folder = out.with_suffix("") / name
        kind = KINDS.get(name, MagnitudePruning)
        earlier = [WeightRewinding({key: value * 0.9 + 0.01 for key, value in Classifier().state_dict().items()})]
        more = earlier if name == "rewind" else []
        whole = fit(mode, [kind(**options), *more], folder / "whole", 2)
        resumed = fit(mode, [kind(**options), *more], folder / "resumed", 2, folder / "whole" / "epoch=0.ckpt")
        record = torch.load(folder / "whole" / "epoch=1.ckpt", weights_only=True)["callbacks"]
        (state,) = (value for key, value in record.items() if key.startswith(kind.__name__))
        content[name] = {"whole": whole, "resumed": resumed, "zeros": state["zeros"]}
        if name == "nm":
            finished = folder / "whole" / "epoch=1.ckpt"
            content["held"] = fit(mode, [ConstantPruning()], folder / "held", 3, finished)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(content, out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
