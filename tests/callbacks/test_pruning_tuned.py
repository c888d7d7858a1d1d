"""Pruning beside Lightning's tuners, which train and restore a checkpoint before pruning starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from qatkit.callbacks import (
    ConstantPruning,
    MagnitudePruning,
    MovementPruning,
    OneShotPruning,
    SparseRefinedSTE,
)
from torch.utils.data import DataLoader

from qatkit.pruning.masks import apply_mask, magnitude_mask
from qatkit.pruning.schedule import Ramp
from tests.callbacks.modules import Classifier, batches, trainer
from tests.support.matrix import representatives

CALLBACKS: dict[str, Callable[[], Callback]] = {
    "constant": ConstantPruning,
    "wanda": lambda: OneShotPruning("wanda", sparsity=0.5, calibration_batches=2),
    "srste": SparseRefinedSTE,
    "movement": lambda: MovementPruning(Ramp(0.5, start=0.2, end=0.8)),
    "at once": lambda: MagnitudePruning(0.5),
    "ramp": lambda: MagnitudePruning(ramp=Ramp(0.5)),
}


class Tuned(Classifier):
    lr = 1e-2
    batch_size = 16

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(batches().dataset, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()


@pytest.mark.parametrize("name", representatives(list(CALLBACKS), {3, 4}))
@pytest.mark.parametrize(
    "tuner",
    [lambda: LearningRateFinder(num_training_steps=8), lambda: BatchSizeFinder(max_trials=1, steps_per_trial=1)],
    ids=["learning rate", "batch size"],
)
def test_the_training_after_the_tuning_is_pruned(name: str, tuner: Callable[[], Callback]) -> None:
    module = Tuned()
    if name == "constant":
        for layer in (module.net[0], module.net[2]):
            apply_mask(layer.weight, magnitude_mask(layer.weight, 0.5))
    trainer(tuner(), CALLBACKS[name](), max_steps=-1, max_epochs=2).fit(module)
    assert (module.net[0].weight == 0).sum() == 64
    assert (module.net[2].weight == 0).sum() == 24
