"""Training, validation and test splits in a reproducible order; a resumed run receives the same batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningDataModule
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from qatkit.errors import QatkitError


@runtime_checkable
class Passes(Protocol):
    """A dataset whose samples differ from one pass to the next."""

    def set_pass(self, number: int) -> None:
        """Start a pass over the data."""
        ...


class SlicedSampler(DistributedSampler[Any]):
    """A `DistributedSampler` whose epochs are slices of one pass over the data.

    Lightning validates and saves checkpoints at the end of an epoch, but a stage may be shorter than one pass over a
    large dataset. Samples that do not fill a slice are dropped; each pass drops different ones.

    Args:
        dataset: A map-style dataset.
        replicas: Number of processes.
        rank: Rank of this process.
        seed: Determines the order.
        size: Samples per process in a slice; if the dataset has fewer, a slice is the whole pass.
    """

    def __init__(self, dataset: Dataset[Any], replicas: int, rank: int, seed: int, size: int | None) -> None:
        super().__init__(dataset, replicas, rank, seed=seed, drop_last=True)
        self.size = min(size or self.num_samples, self.num_samples)
        self.slices = max(self.num_samples // max(self.size, 1), 1)
        self.slice = 0
        self.skip = 0
        """Samples to skip once, at the start of the next slice, because a resumed run has already seen them."""

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
"""Combines samples into a batch."""


class WorkerLoader(DataLoader[Any]):
    """A `DataLoader` whose workers pass on a `QatkitError` unchanged; torch passes on only the text of a traceback.

    Its `dataset` and `collate_fn` are the original ones; only the workers use wrappers that catch errors.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # of a private class of torch
        if self.num_workers == 0:
            return super().__iter__()
        in_workers: DataLoader[Any] = DataLoader(
            _Caught(self.dataset),
            batch_sampler=self.batch_sampler,
            collate_fn=partial(_collate_caught, self.collate_fn),
            num_workers=self.num_workers,
            worker_init_fn=self.worker_init_fn,
        )
        return _raised(iter(in_workers))


class _Caught(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except QatkitError as error:
            return error


def _collate_caught(collate: Callable[[Any], Any], samples: Sequence[Any]) -> Any:
    try:
        return next((sample for sample in samples if isinstance(sample, QatkitError)), None) or collate(samples)
    except QatkitError as error:
        return error


def _raised(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, QatkitError):
            raise batch
        yield batch


class ResumableLoader(WorkerLoader):
    """A `DataLoader` over a `SlicedSampler`, whose state Lightning saves in checkpoints.

    A run that resumes in the middle of an epoch continues with the next batch without rereading earlier samples.

    Args:
        dataset: A map-style dataset.
        batch_size: Samples per batch.
        sampler: Determines the order of samples.
        collate: Combines samples into a batch; the default is torch's collation.
        limit: Returns the maximum number of batches per epoch, once training has started.
        workers: Number of worker processes that read samples; 0 reads them in the current process.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        sampler: SlicedSampler,
        collate: Collate | None = None,
        limit: Callable[[], float] = lambda: math.inf,
        workers: int = 0,
    ) -> None:
        super().__init__(dataset, batch_size, sampler=sampler, drop_last=True, collate_fn=collate, num_workers=workers)
        self.limit = limit
        self._served = self._skip = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # as above
        assert isinstance(self.sampler, SlicedSampler)
        assert self.batch_size is not None
        self._served, self._skip = batches_to_skip(self._skip, min(len(self), self.limit())), 0
        self.sampler.skip = self._served * self.batch_size
        # torch draws a seed for the workers, which in an uninterrupted run it drew before the skipped batches
        with torch.random.fork_rng(devices=[], enabled=self._served > 0):
            batches = super().__iter__()
        for batch in batches:
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches yielded so far in this epoch."""
        return {"batches": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip the recorded number of batches in the next epoch, or none after a complete epoch."""
        self._served = self._skip = state["batches"]


def batches_to_skip(served: int, epoch: float) -> int:
    """Return the number of batches to skip after a resume: 0 if the loader had completed an epoch."""
    return served % max(int(epoch), 1)


_whole: ContextVar[bool] = ContextVar("whole", default=False)


def world_and_rank() -> tuple[int, int]:
    """Return the number of processes that share the training data, and the rank of this process."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() and not _whole.get() else (1, 0)


@contextmanager
def unsliced() -> Iterator[None]:
    """Let every process read all of the training data inside the block, even if a process group exists."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def check_epoch(batches: int) -> None:
    """Raise an error if an epoch has no batch.

    Raises:
        QatkitError: the epoch has no batch.
    """
    if batches < 1:
        raise QatkitError(f"{batches} is out of range", key="epoch_batches", advice="use a positive integer")


class SplitDataModule(LightningDataModule):
    """A data module with map-style training, validation and test sets.

    The training order depends only on `seed`, the epoch and the rank (torch's `DistributedSampler`, even with one
    process). An incomplete last batch of an epoch is dropped. Evaluation visits every sample once, in order.

    Args:
        train: Training set.
        val: Validation set.
        test: Test set; not used in training.
        batch_size: Samples per device per step.
        seed: Determines the order.
        epoch_batches: Maximum number of batches per epoch (see `SlicedSampler`); None uses the whole training set.
        collate: Combines samples into a batch; the default is torch's collation.
        task: Name of a task in `qatkit.tasks.TASKS`; None uses the default of `qatkit.tasks.task_of`.
        workers: Number of worker processes that read samples; 0 reads them in the training process.

    Raises:
        QatkitError: `workers` is negative, or the training set does not fill a batch when training starts.
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
        workers: int = 0,
    ) -> None:
        super().__init__()
        if workers < 0:
            raise QatkitError(f"{workers} is out of range", key="workers", advice="use a non-negative integer")
        self.task = task
        self.workers = workers
        self.train, self.val, self.test = train, val, test
        self.batch_size = batch_size
        self.seed = seed
        self.epoch_batches = epoch_batches
        self.collate = collate

    def train_dataloader(self) -> DataLoader[Any]:
        world, rank = world_and_rank()
        size = self.epoch_batches * self.batch_size if self.epoch_batches else None
        sampler = SlicedSampler(self.train, world, rank, self.seed, size)
        loader = ResumableLoader(self.train, self.batch_size, sampler, self.collate, self.batches_taken, self.workers)
        if not len(loader):  # Lightning would train on nothing, and warn
            raise QatkitError(
                f"{self.batch_size} exceeds the {len(sampler)} training samples of each process",
                key="batch_size",
                advice="use a smaller batch_size, or more data",
            )
        return loader

    def batches_taken(self) -> float:
        """Return the trainer's maximum number of batches per epoch (`limit_train_batches`), or infinity."""
        return math.inf if self.trainer is None else self.trainer.num_training_batches

    def val_dataloader(self) -> DataLoader[Any]:
        return WorkerLoader(self.val, self.batch_size, collate_fn=self.collate, num_workers=self.workers)

    def test_dataloader(self) -> DataLoader[Any]:
        return WorkerLoader(self.test, self.batch_size, collate_fn=self.collate, num_workers=self.workers)
