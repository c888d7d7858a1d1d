"""The loss on training data with which the sensitivity of layers is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from qatkit.callbacks.batches import first_batches
from qatkit.run.folder import Run
from qatkit.tasks import Task, counted_loss, declared_task


def training_loss(run: Run, batch_size: int, count: int) -> Callable[[nn.Module], float]:
    """Return a function that computes a model's mean loss over the first training batches.

    Args:
        run: The run, whose data is built.
        batch_size: Samples per batch.
        count: Number of batches.
    """
    data = run.build_data(batch_size)
    data.prepare_data()
    data.setup("fit")
    return batch_loss(first_batches(data.train_dataloader(), count), declared_task(data))


def batch_loss(batches: Iterable[Any], task: Task | None) -> Callable[[nn.Module], float]:
    """Return a function that computes a model's mean loss over batches, which are kept.

    Args:
        batches: The batches.
        task: The task that the data declares.
    """
    kept = list(batches)

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        losses = [counted_loss(model, batch, task) for batch in kept]
        return sum(float(value) * int(n) for value, n in losses) / max(sum(int(n) for _, n in losses), 1)

    return loss
