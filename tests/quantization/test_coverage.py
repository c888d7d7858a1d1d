"""The line that tells which layers are quantized and which are not."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from qatkit.callbacks import QuantizationAwareTraining
from torch import nn

from qatkit import QuantSpec, prepare_qat
from qatkit.quantization.coverage import coverage
from tests.quantization.families import A8, TOKEN, W4, llama


def test_layers_and_weights_are_counted_and_the_others_are_named() -> None:
    model = nn.ModuleDict(
        {
            "tokens": nn.Embedding(12, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "memory": nn.LSTM(8, 8),
            "norm": nn.LayerNorm(8),
            "head": nn.Linear(8, 12),
        }
    )
    prepare_qat(model, QuantSpec(4, observer="lsq"), A8, exclude=["head"])
    found = coverage(model)  # learned scales are parameters too
    assert list(found.quantized) == ["attention", "attention.out_proj", "memory"]
    weights = 3 * 64 + 64 + 2 * 32 * 8
    assert found.weights == weights / (weights + 2 * 96)
    assert str(found) == "quantized: 3 of 5 layers, 80.0 % of the weights; float: tokens (Embedding), head (Linear)"


def test_tied_weights_count_once_and_long_lists_are_cut() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), *(nn.Bilinear(1, 1, 1) for _ in range(9)), nn.Linear(4, 4, bias=False))
    model[-1].weight = model[0].weight
    prepare_qat(model, W4, include=["10"])
    assert str(coverage(model)).startswith(
        "quantized: 1 of 11 layers, 64.0 % of the weights; float: 0 (Embedding), 1 ("
    )
    assert str(coverage(model)).endswith("7 (Bilinear) and 2 more")


def test_inputs_alone_and_caches_alone_are_told() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prepare_qat(model, activation=TOKEN)
    assert str(coverage(model)) == "quantized: 1 of 1 layers, 0.0 % of the weights"
    cached = llama()
    prepare_qat(cached, kv_cache=TOKEN)
    assert "quantized: 0 of 16 layers, 0.0 % of the weights, the KV cache of 2 attention modules; float: " in str(
        coverage(cached)
    )


def test_the_callback_logs_the_line(caplog: pytest.LogCaptureFixture) -> None:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(x))  # type: ignore[no-any-return]

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    callback = QuantizationAwareTraining(W4)
    trainer.callbacks.append(callback)  # type: ignore[attr-defined]
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        callback.setup(trainer, Module(), "fit")
    assert "quantized: 1 of 2 layers, 50.0 % of the weights; float: embedding (Embedding)" in caplog.text
