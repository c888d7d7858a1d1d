"""Movement pruning equals its definition, also after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from qatkit.callbacks.movement import MovementPruning
from torch.nn import functional as F

from qatkit import QatkitError
from qatkit.pruning.schedule import Ramp
from tests.callbacks.modules import Classifier, batches, network, trainer


class SGD(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_the_weights_that_moved_towards_zero_are_pruned(scope: Any) -> None:
    module = SGD()
    trainer(MovementPruning(Ramp(0.4, start=1.0, end=1.0), scope), max_steps=6).fit(module, batches())

    reference = network().double()
    scores = [torch.zeros_like(reference[i].weight) for i in (0, 2)]
    for x, y in list(batches())[:6]:
        reference.zero_grad()
        F.cross_entropy(reference(x.double()), y).backward()
        for total, index in zip(scores, (0, 2), strict=True):
            total -= reference[index].weight.detach() * reference[index].weight.grad
        for parameter in reference.parameters():
            parameter.data -= 0.5 * parameter.grad
    groups = [torch.cat([s.flatten() for s in scores])] if scope == "model" else [s.flatten() for s in scores]
    expected = [values >= values.sort().values[round(0.4 * len(values))] for values in groups]
    kept = torch.cat([(module.net[i].weight != 0).flatten() for i in (0, 2)])
    assert torch.equal(kept, torch.cat(expected))
    magnitudes = network()[0].weight.detach().abs().flatten()
    assert not torch.equal(expected[0][:128], magnitudes >= magnitudes.sort().values[round(0.4 * 128)])


def test_a_skipped_step_after_an_overflow_does_not_count() -> None:
    class Overflow(Callback):
        """Gradients of one step, as float16 may give them, and what the gradient scaler makes of them."""

        def __init__(self, value: float | None) -> None:
            self.value = value

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 2:
                pl_module.net[0].weight.grad.fill_(self.value if self.value is not None else 0.0)

    found = []
    for value in (0.0, torch.inf, torch.nan):
        module, prune = SGD(), MovementPruning(Ramp(0.4, start=0.8, end=0.8))
        trainer(Overflow(value), prune, Overflow(None), max_steps=6).fit(module, batches())
        found.append(module.net[0].weight)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_along_a_ramp_the_count_is_exact_and_a_resumed_run_is_an_uninterrupted_one(tmp_path: Path) -> None:
    def fit(checkpoint: str | None = None) -> Classifier:
        module = Classifier(weight_decay=0.1)
        save = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
        options = {"max_epochs": 4, "max_steps": -1, "enable_checkpointing": True}
        trainer(MovementPruning(Ramp(0.7, start=0.1, end=0.9)), save, **options).fit(
            module, batches(4), ckpt_path=checkpoint
        )
        return module

    whole, resumed = fit(), fit(str(tmp_path / "epoch=1.ckpt"))
    assert (whole.net[0].weight == 0).sum() == round(0.7 * 128)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_ramp_that_prunes_before_scores_exist_is_refused() -> None:
    for ramp in (Ramp(0.5), Ramp(0.5, start=0.2, initial=0.1)):
        with pytest.raises(
            QatkitError,
            match="would prune before the first step, when no movement scores exist; use initial=0 and a positive",
        ):
            MovementPruning(ramp)
