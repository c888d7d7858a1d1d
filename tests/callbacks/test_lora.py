"""LoRA in a LightningModule that knows nothing of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import modules as bnb_modules
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from qatkit.callbacks import ConstantPruning, LoRA, QuantizationAwareTraining
from torch import nn

from qatkit import QatkitError, QuantSpec
from qatkit.lora.attachment import adapted_layers, merge
from tests.callbacks.modules import Classifier, batches, trainer

X = torch.randn(9, 8, generator=torch.Generator().manual_seed(7))


def lora(**options: Any) -> LoRA:
    return LoRA(rank=2, alpha=4, **options)


@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"bits": 8}, {"dropout": 0.2}, {"dora": True}])
def test_adapters_learn_and_the_frozen_weights_stay(options: dict[str, Any]) -> None:
    module = Classifier()
    start = {name: value.clone() for name, value in module.net.state_dict().items()}
    callback = lora(**options)
    fit = trainer(callback, max_steps=30)
    fit.fit(module, batches(), batches(2))
    assert callback.layers == ["net.0", "net.2"] == list(adapted_layers(module))
    trained = module.eval()(X)
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad and "bias" not in name}
    assert len(frozen) == 2
    if "bits" not in options:
        assert all(torch.equal(value, start[name.split(".")[1] + ".weight"]) for name, value in frozen.items())
    assert merge(module) == callback.layers
    # LLM.int8 rounds inputs as well where nothing needs a gradient
    torch.testing.assert_close(module(X), trained, rtol=1e-4, atol=2e-2 if options.get("bits") == 8 else 1e-5)
    assert (trained - Classifier()(X)).abs().max() > 0.1
    assert sorted(module.net.state_dict()) == sorted(start)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_where_the_whole_module_trains_in_16_bits_the_merged_one_runs_in_them(
    bits: int | None, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    module = Classifier()
    trainer(lora(bits=bits), max_steps=2, precision="bf16-true").fit(module, batches())
    trained = module.eval()(X.bfloat16())
    merge(module)
    assert {value.dtype for value in module.state_dict().values()} == {torch.bfloat16}
    torch.testing.assert_close(module(X.bfloat16()), trained, rtol=0.05, atol=0.05)
    assert "inputs will be cast" not in capfd.readouterr().err + caplog.text


def losses(validate: bool, **options: Any) -> list[float]:
    class Watched(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            found.append(loss := super().training_step(batch, batch_idx))
            return loss

    found: list[torch.Tensor] = []
    module = Watched(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)))
    loaders = (batches(), batches(2)) if validate else (batches(),)
    trainer(lora(**options), max_steps=12, val_check_interval=3 if validate else None).fit(module, *loaders)
    return [float(loss) for loss in found]


def test_a_validation_loop_inside_training_changes_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    # whatever this processor is: bitsandbytes takes it for one on which it repacks weights in eval mode
    monkeypatch.setattr(bnb_modules, "has_avx512bf16", lambda: True)
    assert bitsandbytes.nn.Linear4bit(8, 8).support_avx512bf16_for_cpu
    torch.manual_seed(1)
    with_it = losses(True, bits=4)
    torch.manual_seed(1)
    assert with_it == losses(False, bits=4)
    assert with_it[-1] < with_it[0]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"bits": 8}])
def test_a_fit_that_is_stopped_and_resumed_ends_with_the_same_bits(
    quantized: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    if quantized and options:
        pytest.skip("refused: one weight cannot be held in 4 bits and fake-quantized")

    def fit(steps: int, resume: Path | None = None) -> Classifier:
        module = Classifier()
        if resume is not None:
            nn.init.normal_(module.net[0].weight)  # the base comes from the checkpoint, not from the script
        qat = [QuantizationAwareTraining(QuantSpec(4, observer="lsq"))] if quantized else []
        saved = ModelCheckpoint(tmp_path, "last", save_top_k=1, every_n_train_steps=4, enable_version_counter=False)
        options_ = {"max_steps": steps, "enable_checkpointing": True}
        trainer(*qat, lora(**options), saved, **options_).fit(module, batches(4), ckpt_path=resume)
        return module.eval()

    whole = fit(8)
    fit(4)
    resumed = fit(8, tmp_path / "last.ckpt")
    assert torch.equal(resumed(X), whole(X))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_behind_quantization_the_rounded_sum_is_trained_and_the_optimizer_holds_no_weight() -> None:
    module = Classifier()
    fit = trainer(QuantizationAwareTraining(QuantSpec(4, observer="lsq"), init="gptq"), lora(), max_steps=20)
    fit.fit(module, batches())
    held = sum(value.numel() for state in fit.optimizers[0].state.values() for value in state.values())
    adapters, scales = 2 * (8 + 16) + 2 * (16 + 3), 16 + 3
    steps = 6  # Adam counts them for every parameter
    assert held == 2 * (adapters + scales) + steps
    trained = module.eval()(X)
    merge(module)
    assert torch.equal(module(X), trained)


def test_held_zeros_stay_and_other_weights_move() -> None:
    module = Classifier()
    weight = module.net[0].weight
    weight.data[:, ::2] = 0
    start = copy.deepcopy(weight)
    trainer(lora(held=["net.0"])).fit(module, batches())
    merge(module)
    merged = module.net[0].weight
    assert not merged[:, ::2].any()
    assert (merged[:, 1::2] != start[:, 1::2]).all()


def test_it_gives_every_run_the_same_start_and_draws_from_nobodys_generator() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        module = Classifier()
        torch.manual_seed(6)
        before = torch.get_rng_state()
        callback = lora(seed=3)
        fit = trainer(callback)
        callback.setup(fit, module, "fit")
        assert torch.equal(torch.get_rng_state(), before)
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def refused(*callbacks: Any, module: Classifier | None = None, **options: Any) -> str:
    module = module or Classifier()
    with pytest.raises(QatkitError) as caught:
        trainer(*callbacks, **options).fit(module, batches())
    assert all(parameter.requires_grad for parameter in module.parameters())
    return str(caught.value)


def test_what_cannot_work_is_refused_with_the_reason() -> None:
    qat = QuantizationAwareTraining(QuantSpec(4))
    assert refused(lora(targets=["net.1"])).startswith("targets[0]: 'net.1' matches no linear layer; did you mean")
    assert "QuantizationAwareTraining must replace layers before" in refused(lora(), qat)
    assert "ConstantPruning prunes weights that LoRA freezes" in refused(ConstantPruning(), lora())
    assert "cannot also be fake-quantized" in refused(QuantizationAwareTraining(QuantSpec(4)), lora(bits=4))
    assert "dora: True is not supported for a layer" in refused(
        QuantizationAwareTraining(QuantSpec(4)), lora(dora=True)
    )
    assert "the module has no layer 'net.7'" in refused(lora(held=["net.7"]))
    sharded = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    callback = lora(bits=4)
    fit = trainer(callback, strategy=sharded, devices=1)
    with pytest.raises(QatkitError, match=r"bits: ModelParallelStrategy shards parameters.*use strategy ddp"):
        callback.setup(fit, Classifier(), "fit")
    with pytest.raises(QatkitError, match="bits: 4-bit weights do not support a sparsity mask"):
        lora(bits=4, held=["net.0"])


def test_an_adapter_without_a_rank_is_refused_before_there_is_a_trainer() -> None:
    with pytest.raises(QatkitError, match=r"^rank: 0 is out of range; use a positive integer$"):
        LoRA(rank=0)


@pytest.mark.parametrize(("strategy", "name"), [("ddp_spawn", "ddp_spawn"), ("ddp_fork", "ddp_fork or ddp_notebook")])
def test_strategies_that_lose_what_their_processes_trained_are_refused(strategy: str, name: str) -> None:
    for callback in (lora(), QuantizationAwareTraining(QuantSpec(4))):
        fit = trainer(callback, strategy=strategy, devices=2)
        with pytest.raises(QatkitError, match=rf"^strategy: {name} trains a copy of the module.*; use ddp,"):
            callback.setup(fit, Classifier(), "fit")
