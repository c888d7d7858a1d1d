"""Three splits, and an order that depends on the seed and the epoch alone: a resumed run sees the same batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningDataModule
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler


@runtime_checkable
class Passes(Protocol):
    """A data set whose samples depend on how often it was gone through."""

    def set_pass(self, number: int) -> None: ...


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
        self.skip = 0
        """Samples to leave out at the start of the next slice, once: those that a resumed run has seen."""

    def set_epoch(self, epoch: int) -> None:
        self.slice = epoch % self.slices
        super().set_epoch(epoch // self.slices)
        if isinstance(self.dataset, Passes):
            self.dataset.set_pass(epoch // self.slices)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        return islice(super().__iter__(), self.slice * self.size + skip, (self.slice + 1) * self.size)


Collate = Callable[[Sequence[Any]], Any]
"""Makes a batch of samples."""


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` in the order of a `SlicedSampler`, with the state that Lightning keeps in a checkpoint.

    A run that resumes in the middle of an epoch gets the batch that it would have got next, and the samples before that
    are not read again.

    Args:
        dataset: A map-style data set.
        batch_size: Samples of a batch.
        sampler: Their order.
        collate: Makes a batch of samples; by default torch's own way.
        limit: Says, once training began, how many batches of an epoch it takes at most.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        sampler: SlicedSampler,
        collate: Collate | None = None,
        limit: Callable[[], float] = lambda: math.inf,
    ) -> None:
        super().__init__(dataset, batch_size, sampler=sampler, drop_last=True, collate_fn=collate)
        self.limit = limit
        self._served = self._skip = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # of a private class of torch
        assert isinstance(self.sampler, SlicedSampler)
        assert self.batch_size is not None
        self._served, self._skip = batches_to_skip(self._skip, min(len(self), self.limit())), 0
        self.sampler.skip = self._served * self.batch_size
        for batch in super().__iter__():
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch were given out."""
        return {"batches": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next epoch after as many batches; after a whole one, at its start."""
        self._served = self._skip = state["batches"]


def batches_to_skip(served: int, epoch: float) -> int:
    """How many batches of the next epoch were given out by a loader that stopped: none, if it had ended one."""
    return served % max(int(epoch), 1)


_whole: ContextVar[bool] = ContextVar("whole", default=False)


def world_and_rank() -> tuple[int, int]:
    """How many processes share the training data, and which of them this one is."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() and not _whole.get() else (1, 0)


@contextmanager
def unsliced() -> Iterator[None]:
    """Inside, every process reads the training data as one process would, whether or not it has met the others yet."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


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
        collate: Makes a batch of samples; by default torch's own way.
        task: Name of a row of `qatkit.tasks.TASKS`; None leaves the default of `qatkit.tasks.task_of`.
    """

    def __init__(
        self,
        train: Dataset[Any],
        val: Dataset[Any],
        test: Dataset[Any],
        batch_size: int = 64,
        seed: int = 0,
        epoch_batches: int | None = None,
        collate: Collate | None = None,
        task: str | None = None,
    ) -> None:
        super().__init__()
        self.task = task
        self.train, self.val, self.test = train, val, test
        self.batch_size = batch_size
        self.seed = seed
        self.epoch_batches = epoch_batches
        self.collate = collate

    def train_dataloader(self) -> DataLoader[Any]:
        world, rank = world_and_rank()
        size = self.epoch_batches * self.batch_size if self.epoch_batches else None
        sampler = SlicedSampler(self.train, world, rank, self.seed, size)
        return ResumableLoader(self.train, self.batch_size, sampler, self.collate, self.batches_taken)

    def batches_taken(self) -> float:
        """How many batches of an epoch the trainer takes (`limit_train_batches`), infinite while it has none."""
        return math.inf if self.trainer is None else self.trainer.num_training_batches

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, self.batch_size, collate_fn=self.collate)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, self.batch_size, collate_fn=self.collate)
