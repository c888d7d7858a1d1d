"""SR-STE equals its equation, written out for one layer."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from qatkit.callbacks.srste import SparseRefinedSTE
from torch.nn import functional as F

from qatkit import QatkitError
from qatkit.pruning.masks import nm_mask
from tests.callbacks.modules import Classifier, batches, network, trainer


class SGD(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_every_step_equals_the_update_of_the_paper(decay: float) -> None:
    module = SGD()
    callback = SparseRefinedSTE((2, 4), decay, include=["net.0"])
    trainer(callback).fit(module, batches())
    pickle.dumps(callback)

    reference = network().double()
    latent = reference[0].weight.detach().clone()
    masks = []
    for x, y in batches():
        masks.append(nm_mask(latent.float(), 2, 4))
        reference[0].weight.data = latent * masks[-1]
        reference.zero_grad()
        F.cross_entropy(reference(x.double()), y).backward()
        latent = latent - 0.2 * (reference[0].weight.grad + decay * ~masks[-1] * latent)
        for parameter in (reference[0].bias, *reference[2].parameters()):
            parameter.data -= 0.2 * parameter.grad
    assert not torch.equal(masks[0], masks[-1])  # masks do change
    torch.testing.assert_close(module.net[0].weight.double(), latent * nm_mask(latent.float(), 2, 4), atol=1e-6, rtol=0)
    torch.testing.assert_close(module.net[2].weight.double(), reference[2].weight, atol=1e-6, rtol=0)


def test_validated_and_saved_weights_are_sparse(tmp_path: Path) -> None:
    seen = []

    class Validating(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append((self.net[0].weight == 0).sum().item())

    fit = trainer(SparseRefinedSTE(), val_check_interval=2, num_sanity_val_steps=1, limit_val_batches=1)
    fit.fit(Validating(), batches(), batches(1))
    assert seen == [64] * 5
    fit.save_checkpoint(tmp_path / "saved.ckpt")
    content = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    groups = content["state_dict"]["net.2.weight"].view(3, 4, 4)
    assert ((groups != 0).sum(dim=2) == 2).all()
    resumed = Classifier()
    trainer(SparseRefinedSTE(), max_steps=12).fit(resumed, batches(), ckpt_path=str(tmp_path / "saved.ckpt"))
    assert ((resumed.net[2].weight.view(3, 4, 4) != 0).sum(dim=2) == 2).all()


def test_every_forward_is_sparse_when_a_module_steps_several_times_in_a_batch() -> None:
    seen = []

    class ByHand(Classifier):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for _ in range(3):
                seen.append((self.net[0].weight == 0).sum().item())
                optimizer.zero_grad()  # type: ignore[union-attr]
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()  # type: ignore[union-attr]

    trainer(SparseRefinedSTE()).fit(ByHand(), batches())
    assert seen == [64] * len(seen)
    assert len(seen) > 3


def test_two_callbacks_work_in_one_trainer() -> None:
    module = Classifier()
    trainer(SparseRefinedSTE(include=["net.0"]), SparseRefinedSTE((1, 4), include=["net.2"])).fit(module, batches())
    assert (module.net[0].weight == 0).sum() == 64
    assert (module.net[2].weight == 0).sum() == 36


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(QatkitError, match=r"groups of 5 do not divide the inputs of layer 'net.2', .* \[3, 16\]"):
        trainer(SparseRefinedSTE((2, 5), include=["net.2"])).fit(Classifier(), batches())
    with pytest.raises(QatkitError, match="averages weights with different masks"):
        trainer(SparseRefinedSTE(), EMAWeightAveraging()).fit(Classifier(), batches())
    with pytest.raises(QatkitError, match="StochasticWeightAveraging averages weights with different masks"):
        trainer(SparseRefinedSTE(), StochasticWeightAveraging(1e-3)).fit(Classifier(), batches())
    with pytest.raises(QatkitError, match=r"nm: \[4, 2\] would keep 4 of every 2 weights; use 0 < N < M"):
        SparseRefinedSTE((4, 2))
    with pytest.raises(QatkitError, match="decay: -1 is out of range"):
        SparseRefinedSTE(decay=-1)
