"""Three splits, and an order that depends on the seed and the epoch alone: a resumed run sees the same batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class SlicedSampler(DistributedSampler[Any]):
    """Torch's `DistributedSampler` whose epochs are slices of a pass over the data.

    A model is validated and its checkpoint is written at an epoch's end, and a stage may be shorter than one pass over
    a long text. The samples that fill no slice are left out, others in every pass.

    Args:
        dataset: A map-style data set.
        replicas: Processes.
        rank: This process.
        seed: Decides the order.
        size: Samples per process in a slice; where the data set has fewer, a slice is the whole pass.
    """

    def __init__(self, dataset: Dataset[Any], replicas: int, rank: int, seed: int, size: int | None) -> None:
        super().__init__(dataset, replicas, rank, seed=seed, drop_last=True)
        self.size = min(size or self.num_samples, self.num_samples)
        self.slices = max(self.num_samples // max(self.size, 1), 1)
        self.slice = 0

    def set_epoch(self, epoch: int) -> None:
        self.slice = epoch % self.slices
        super().set_epoch(epoch // self.slices)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        return islice(super().__iter__(), self.slice * self.size, (self.slice + 1) * self.size)


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
        epoch_batches: Batches of an epoch at most, see `SlicedSampler`; None makes it the whole training set.
    """

    def __init__(
        self,
        train: Dataset[Any],
        val: Dataset[Any],
        test: Dataset[Any],
        batch_size: int = 64,
        seed: int = 0,
        epoch_batches: int | None = None,
    ) -> None:
        super().__init__()
        self.train, self.val, self.test = train, val, test
        self.batch_size = batch_size
        self.seed = seed
        self.epoch_batches = epoch_batches

    def train_dataloader(self) -> DataLoader[Any]:
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        size = self.epoch_batches * self.batch_size if self.epoch_batches else None
        sampler = SlicedSampler(self.train, world, rank, self.seed, size)
        return DataLoader(self.train, self.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, self.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, self.batch_size)
