"""The starting point of quantization-aware training in anybody's LightningModule, and in a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qatkit.callbacks import QuantizationAwareTraining

from qatkit import QatkitError, QuantSpec, fake_quantize
from qatkit.pipeline.runner import run_stages
from qatkit.quantization.prepare import quantized_weights
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.callbacks.modules import Classifier, batches, trainer

W3 = QuantSpec(num_bits=3, observer="lsq")


def outputs_error(init: Any) -> float:
    module = Classifier()
    x = torch.cat([batch[0] for batch in batches()])
    expected = module(x).detach()
    trainer(QuantizationAwareTraining(weight=W3, init=init), max_steps=0).fit(module, batches())
    return float((module(x) - expected).square().mean())


def test_gptq_and_awq_start_nearer_to_the_float_model_than_ranges_do() -> None:
    errors = {init: outputs_error(init) for init in ("rtn", "mse", "gptq", "awq")}
    assert errors["gptq"] < errors["mse"]
    assert errors["awq"] < errors["rtn"]
    assert errors["mse"] == outputs_error(None)


def test_gptq_leaves_weights_on_the_grid_and_training_moves_them_off_again() -> None:
    module = Classifier()
    trainer(QuantizationAwareTraining(weight=W3, init="gptq"), max_steps=0).fit(module, batches())
    for _, weight, fake_quant in quantized_weights(module):
        scale, zero_point = fake_quant.qparams(weight)
        torch.testing.assert_close(fake_quantize(weight, scale, zero_point, W3), weight, rtol=1e-6, atol=1e-7)
    module = Classifier()
    trainer(QuantizationAwareTraining(weight=W3, init="gptq"), max_steps=8).fit(module, batches())
    assert any(not torch.equal(fake_quant(weight), weight) for _, weight, fake_quant in quantized_weights(module))


def test_a_method_that_sets_scales_is_refused_where_they_are_computed_and_nothing_changes() -> None:
    module = Classifier()
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(QatkitError, match="gptq sets scales, but observer 'minmax' computes them"):
        trainer(QuantizationAwareTraining(weight=QuantSpec(num_bits=3), init="gptq")).fit(module, batches())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(module.parameters(), before, strict=True))


def test_a_fit_after_a_resumed_one_trains_on_and_does_not_apply_ptq_again(tmp_path: Path) -> None:
    first = trainer(QuantizationAwareTraining(weight=W3, init="gptq"), max_steps=4)
    first.fit(Classifier(), batches())
    first.save_checkpoint(tmp_path / "half.ckpt")
    module, callback = Classifier(), QuantizationAwareTraining(weight=W3, init="gptq")
    trainer(callback, max_steps=8).fit(module, batches(), ckpt_path=tmp_path / "half.ckpt")
    before = [parameter.clone() for parameter in module.parameters()]
    trainer(callback, max_steps=0).fit(module, batches())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(module.parameters(), before, strict=True))


def test_an_unknown_starting_point_is_refused_before_a_module_is_touched() -> None:
    with pytest.raises(QatkitError, match="init: unknown PTQ method 'gpqt'; did you mean 'gptq'"):
        QuantizationAwareTraining(weight=W3, init="gpqt")  # type: ignore[arg-type]
    with pytest.raises(QatkitError, match="calibration_batches: 0 is out of range; use a positive integer"):
        QuantizationAwareTraining(weight=W3, calibration_batches=0)


def test_a_recipe_compares_starting_points_as_stages_without_steps(tmp_path: Path) -> None:
    text = tmp_path / "recipe.yaml"
    text.write_text(
        """
name: starts
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [32], num_classes: 10}}
data: {factory: "qatkit.data:digits"}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 80}
  rtn: {max_steps: 0, quantize: {weight: {num_bits: 2}}}
  gptq: {max_steps: 0, quantize: {weight: {num_bits: 2, observer: mse}, init: gptq}}
export: {format: dense}
"""
    )
    run = Run(load_recipe(str(text)), tmp_path / "run")
    run_stages(run)
    accuracy = {stage: run.record(stage).metrics["val/accuracy"] for stage in ("dense", "rtn", "gptq")}
    assert accuracy["rtn"] < accuracy["gptq"] <= accuracy["dense"] + 0.05
