"""Quantization beside other callbacks and precisions of Lightning: it works, or the error says what to change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.tuner import Tuner
from qatkit.callbacks import QuantizationAwareTraining
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qatkit import QatkitError, QuantSpec
from qatkit.quantization import fake_quantizers

LSQ = QuantSpec(num_bits=4, observer="lsq")
STATIC = QuantSpec(num_bits=8, symmetric=False, strategy="tensor")


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        self.lr = 1e-3
        self.validated: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.validated.append(float((self(batch[0]) - batch[1]).square().mean()))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def loader() -> DataLoader[Any]:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)


def qat() -> QuantizationAwareTraining:
    return QuantizationAwareTraining(weight=LSQ, activation=STATIC)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "accelerator": "cpu", "max_steps": 4,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), default_root_dir=folder, **(quiet | options))


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_bf16_true_trains_float32_scales(tmp_path: Path) -> None:
    module = Regression()
    seen: list[dict[str, Tensor]] = []

    class Record(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.append(
                {name: fq.scale.detach().clone() for name, fq in fake_quantizers(module) if fq.scale is not None}
            )

    callbacks = (qat(), Record())
    trainer(tmp_path, *callbacks, precision="bf16-true").fit(module, loader())
    assert module.net[0].weight.dtype == torch.bfloat16
    for name, first in seen[0].items():
        assert first.dtype == torch.float32
        if "weight" in name:
            assert (seen[1][name] != first).float().mean() > 0.5, name  # units that ReLU turns off have no gradient


def test_learned_scales_are_not_sharded_together_with_bf16_weights(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(weight=LSQ)
    sharded = trainer(tmp_path, callback, strategy=ModelParallelStrategy(), precision="bf16-true", devices=1)
    with pytest.raises(
        QatkitError, match=r"precision: 'bf16-true' is not supported with learned scales .*; use bf16-mix"
    ):
        callback.setup(sharded, Regression(), "fit")


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_a_learning_rate_finder_runs_on_calibrated_scales(tmp_path: Path) -> None:
    module = Regression()
    finder = LearningRateFinder(num_training_steps=8, early_stop_threshold=None)
    for callbacks in ((finder, qat()), (qat(), finder)):
        trainer(tmp_path, *callbacks).fit(Regression(), loader())
        assert finder.optimal_lr is not None
        assert all(math.isfinite(loss) for loss in finder.optimal_lr.results["loss"])
    found = Tuner(trainer(tmp_path, qat())).lr_find(module, loader(), num_training=8, early_stop_threshold=None)
    assert found is not None
    assert all(math.isfinite(loss) for loss in found.results["loss"])


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_a_batch_size_finder_runs_on_calibrated_scales(tmp_path: Path) -> None:
    class Sized(Regression):
        batch_size = 32

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(loader().dataset, batch_size=self.batch_size)

        val_dataloader = train_dataloader

    module = Sized()
    trainer(tmp_path, BatchSizeFinder(max_trials=2, steps_per_trial=1), qat()).fit(module)
    assert module.batch_size == 4  # from 2, doubled once


def test_weight_averages_are_refused_before_quantization(tmp_path: Path) -> None:
    for average in (StochasticWeightAveraging(swa_lrs=1e-3), EMAWeightAveraging()):
        callbacks = (average, qat())
        with pytest.raises(QatkitError, match=f"callbacks: {type(average).__name__} copies the module before"):
            trainer(tmp_path, *callbacks).fit(Regression(), loader())


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_an_average_that_has_seen_no_step_validates_with_calibrated_scales(tmp_path: Path) -> None:
    module = Regression()
    late = EMAWeightAveraging(update_starting_at_step=100)
    callbacks = (qat(), late)
    trainer(tmp_path, *callbacks, val_check_interval=2).fit(module, loader(), loader())
    assert len(module.validated) > 2
    assert all(math.isfinite(loss) for loss in module.validated)
