"""Three splits, and an order that depends on the seed and the epoch alone: a resumed run sees the same batches."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class SplitDataModule(LightningDataModule):
    """A data module over map-style train, validation and test sets.

    The training order is a function of `seed`, the epoch and the rank (torch's `DistributedSampler`, also on one
    process); the last incomplete batch of an epoch is dropped. Evaluation goes through every sample in order.

    Args:
        train: Training set.
        val: Validation set.
        test: Test set; never looked at while training.
        batch_size: Samples per device and step.
        seed: Decides the order.
    """

    def __init__(
        self, train: Dataset[Any], val: Dataset[Any], test: Dataset[Any], batch_size: int = 64, seed: int = 0
    ) -> None:
        super().__init__()
        self.train, self.val, self.test = train, val, test
        self.batch_size = batch_size
        self.seed = seed

    def train_dataloader(self) -> DataLoader[Any]:
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.train, num_replicas=world, rank=rank, seed=self.seed, drop_last=True
        )
        return DataLoader(self.train, self.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, self.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, self.batch_size)
