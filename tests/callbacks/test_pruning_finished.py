"""A fit that resumes at its last step trains nothing, and still restores its pruning callbacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qatkit.callbacks import (
    ConstantPruning,
    MagnitudePruning,
    MovementPruning,
    OneShotPruning,
    SparseRefinedSTE,
    WeightRewinding,
)

from qatkit import QatkitError, Ramp
from tests.callbacks.modules import Classifier, batches, trainer

KINDS: dict[str, Callable[[], Any]] = {
    "at once": lambda: MagnitudePruning(0.5),
    "ramp over the model": lambda: MagnitudePruning(ramp=Ramp(0.5, end=0.5), scope="model"),
    "some layers": lambda: MagnitudePruning(0.5, exclude=["net.2"]),
    "constant": ConstantPruning,
    "movement": lambda: MovementPruning(Ramp(0.5, start=0.2, end=0.8)),
    "srste": lambda: SparseRefinedSTE((2, 4)),
    "wanda": lambda: OneShotPruning("wanda", 0.5),
}


def same(one: Any, two: Any) -> bool:
    """Whether two callback states are equal, tensors included."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    return bool(one == two)


def finished(folder: Path, kind: str) -> tuple[Any, Classifier]:
    """Train to the last step, and save."""
    module = Classifier()
    if kind == "constant":
        trainer(MagnitudePruning(0.5), max_steps=1).fit(module, batches())
    callback = KINDS[kind]()
    fit = trainer(callback, max_steps=6)
    fit.fit(module, batches())
    fit.save_checkpoint(folder / "last.ckpt")
    return callback, module


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_fit_restores_the_layers_the_state_and_the_weights(tmp_path: Path, kind: str) -> None:
    before, trained = finished(tmp_path, kind)
    after, module = KINDS[kind](), Classifier()
    trainer(after, max_steps=6).fit(module, batches(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert after.layers == before.layers != []
    assert same(after.state_dict(), before.state_dict())
    for key, value in trained.state_dict().items():
        assert torch.equal(module.state_dict()[key], value), key


@pytest.mark.parametrize("kind", KINDS)
def test_a_callback_knows_its_layers_from_its_state_alone(tmp_path: Path, kind: str) -> None:
    before, _ = finished(tmp_path, kind)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    after = KINDS[kind]()
    after.load_state_dict(content["callbacks"][before.state_key])
    assert after.layers == before.layers
    assert same(after.state_dict(), before.state_dict())


def test_a_finished_fit_counts_the_zeros_that_it_loaded(tmp_path: Path) -> None:
    finished(tmp_path, "at once")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    content["state_dict"]["net.0.weight"][0] = 1.0
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(QatkitError, match=r"layer 'net\.0' was saved with 64 zeros in 128 weights, but its loaded"):
        trainer(MagnitudePruning(0.5), max_steps=6).fit(Classifier(), batches(), ckpt_path=str(tmp_path / "last.ckpt"))


def test_a_finished_fit_does_not_rewind_again(tmp_path: Path) -> None:
    early = {key: value.clone() for key, value in Classifier().state_dict().items()}
    module = Classifier()
    fit = trainer(MagnitudePruning(0.5), WeightRewinding(early), max_steps=6)
    fit.fit(module, batches())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = Classifier()
    callbacks = [MagnitudePruning(0.5), WeightRewinding(early)]
    trainer(*callbacks, max_steps=6).fit(again, batches(), ckpt_path=str(tmp_path / "last.ckpt"))
    for key, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
