"""Callbacks on a GPU: every kind in one Trainer, and a resume that changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from qatkit.callbacks import (
    CompressionMonitor,
    KnowledgeDistillation,
    MagnitudePruning,
    QuantizationAwareTraining,
    SparseRefinedSTE,
)

from qatkit import QuantSpec
from tests.callbacks.modules import Classifier, batches, network, trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

A8 = QuantSpec(symmetric=False, strategy="tensor")


@pytest.mark.parametrize("pruning", [MagnitudePruning, SparseRefinedSTE])
def test_a_resumed_run_is_the_uninterrupted_one(pruning: type[Callback], tmp_path: Path) -> None:
    def fit(epochs: int, checkpoint: Path | None = None) -> Classifier:
        module = Classifier()
        callbacks = [
            pruning(nm=(2, 4)),  # type: ignore[call-arg]
            QuantizationAwareTraining(QuantSpec(num_bits=4, observer="lsq"), A8),
            KnowledgeDistillation(network(), student="net"),
            CompressionMonitor(every=2),
            ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1),
        ]
        options = {"max_epochs": epochs, "max_steps": -1, "enable_checkpointing": True, "accelerator": "gpu"}
        trainer(*callbacks, **options).fit(module, batches(4), ckpt_path=checkpoint and str(checkpoint))
        return module

    torch.cuda.reset_peak_memory_stats()
    whole = fit(4)
    assert torch.cuda.max_memory_allocated() > 0
    torch.manual_seed(99)
    resumed = fit(4, tmp_path / "epoch=1.ckpt")
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(value, resumed.state_dict()[key], rtol=1e-6, atol=1e-7)
    weight = whole.net[0].weight
    assert ((weight != 0).view(-1, 4).sum(1) <= 2).all()
    assert not torch.equal(weight.cpu(), network()[0].weight)
