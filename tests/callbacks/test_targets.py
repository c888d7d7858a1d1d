"""`target=` refuses a model that the export format cannot hold before a layer changes, in the words of `validate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from qatkit.callbacks import QuantizationAwareTraining
from torch import nn

from qatkit import QatkitError, QuantSpec, Scheme, prepare_qat, scheme
from qatkit.export import FORMATS
from qatkit.models import llama
from qatkit.pipeline.export import check_export
from qatkit.recipe.loading import load_recipe
from tests.callbacks.modules import Classifier, batches, network, trainer

W8 = QuantSpec(num_bits=8)
FP8 = {"net.1": Scheme(QuantSpec(num_bits=8, type="float"))}


class Writer(LightningModule):
    """A LightningModule around a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.student = llama(vocab_size=64, hidden=16, layers=1, heads=2, kv_heads=1, intermediate=32)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("training must not begin")

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(24, 3))


def test_a_layer_that_the_format_cannot_hold_is_refused_before_a_layer_changes() -> None:
    module = Classifier(convolutional())
    with pytest.raises(
        QatkitError, match=r"^target: layer 'net\.1': ONNX integer QDQ does not support weight .* type: float"
    ):
        trainer(QuantizationAwareTraining(W8, layers=FP8, target="onnx")).fit(module, batches())
    assert type(module.net[1]) is nn.Conv1d
    trainer(QuantizationAwareTraining(W8, layers=FP8, target="dense"), max_steps=1).fit(module, batches())


def test_an_excluded_layer_and_no_target_are_not_refused() -> None:
    trainer(QuantizationAwareTraining(W8, exclude=["net.1"], layers=FP8, target="onnx"), max_steps=1).fit(
        Classifier(convolutional()), batches()
    )
    trainer(QuantizationAwareTraining(W8, layers=FP8), max_steps=1).fit(Classifier(convolutional()), batches())


def test_the_text_is_that_of_validate() -> None:
    module = Writer()
    callback = QuantizationAwareTraining(QuantSpec(num_bits=3), include=["*q_proj"], target="compressed_tensors")
    with pytest.raises(QatkitError) as ours:
        trainer(callback).fit(module, batches())
    stages = "stages={qat: {max_steps: 1, quantize: {weight: {num_bits: 3}, include: ['*q_proj']}}}"
    with pytest.raises(QatkitError) as theirs:
        check_export(
            load_recipe("llm/int4_qat", [stages, "export.format=compressed_tensors"]), "qat", module.student, None
        )
    assert "layer 'model.layers.0.self_attn.q_proj': different versions" in ours.value.problem
    assert theirs.value.problem == f"stage 'qat': {ours.value.problem}"
    assert theirs.value.advice == ours.value.advice


def test_quantized_keys_and_values_are_asked_about_too() -> None:
    cached = QuantizationAwareTraining(kv_cache=QuantSpec(strategy="token"), target="compressed_tensors")
    with pytest.raises(QatkitError, match=r"^target: transformers does not quantize the KV cache"):
        trainer(cached).fit(Writer(), batches())


def test_an_unknown_format_is_refused_when_the_callback_is_made() -> None:
    with pytest.raises(QatkitError, match=r"target: there is no runtime or export format 'onx'; did you mean 'onnx'\?"):
        QuantizationAwareTraining(W8, target="onx")


def test_a_model_from_prepare_qat_is_checked_without_training_too() -> None:
    model = nn.Sequential(nn.Linear(8, 8), network())
    w8a8 = scheme("W8A8")
    prepare_qat(model, w8a8.weight, w8a8.activation)
    FORMATS["dense"].check_model(model)
    with pytest.raises(QatkitError, match=r"^layer '0': ONNX Runtime does not support dynamic .*token"):
        FORMATS["onnx"].check_model(model)
