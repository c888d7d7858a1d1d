"""What stops a starting point, and what it leaves behind: the model as it was, and one clear sentence."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import MixtralConfig, MixtralForCausalLM

from qatkit import QatkitError, QatkitWarning, QuantSpec, calibrate, prepare_qat
from qatkit.quantization.prepare import qat_layers
from qatkit.quantization.ptq.runner import apply_ptq
from tests.quantization.ptq.models import A8, DATA, W3, W3_CHANNEL, cnn, mlp, tiny


def test_what_a_method_cannot_serve_keeps_its_own_scale_and_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(144, 2))
    prepare_qat(model, weight=W3_CHANNEL)
    before = model[0].weight_fake_quant.scale.clone()
    with pytest.warns(QatkitWarning, match=r"gptq: these layers keep their scales: 0 \(grouped convolution\)$"):
        assert apply_ptq(model, "gptq", [torch.randn(8, 4, 8, 8)]) == ["2", "4"]
    assert torch.equal(model[0].weight_fake_quant.scale, before)

    model = nn.Sequential(nn.ConvTranspose1d(4, 4, 3), nn.Flatten(), nn.Linear(32, 2))
    prepare_qat(model, weight=W3_CHANNEL)
    with pytest.warns(QatkitWarning, match=r"gptq: these layers keep their scales: 0 \(ConvTranspose1d\)$"):
        assert apply_ptq(model, "gptq", [torch.randn(8, 4, 6)]) == ["2"]

    tied = tiny("gpt2")
    prepare_qat(tied, weight=QuantSpec(8, observer="mse"), include=["lm_head", "transformer.wte", "*.c_fc"])
    weight = tied.lm_head.weight.clone()
    with pytest.warns(QatkitWarning, match=r"transformer.wte \(embedding\), lm_head \(shared weight\)"):
        apply_ptq(tied, "gptq", DATA)
    assert torch.equal(tied.lm_head.weight, weight)

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    moe = MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=64, num_hidden_layers=2, num_local_experts=2)).eval()
    prepare_qat(moe, weight=W3, exclude=["lm_head", "*.gate"])
    with pytest.warns(QatkitWarning, match=r"model.layers.0.mlp.experts.down_proj \(fused experts\)"):
        assert len(apply_ptq(moe, "gptq", DATA)) == 8


def test_modes_caches_and_random_numbers_are_as_before() -> None:
    model = tiny("llama").train()
    model.model.norm.eval()
    prepare_qat(model, weight=W3, exclude=["lm_head"])
    state = torch.get_rng_state()

    def batches() -> Iterator[Tensor]:
        for _ in range(2):
            yield torch.randint(1, 64, (2, 8))  # draws random numbers

    apply_ptq(model, "awq", batches())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.use_cache
    assert (model.training, model.model.norm.training) == (True, False)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_dropout_is_off_while_inputs_are_watched() -> None:
    weights = []
    plain = tiny("gpt2")
    for training in (False, True):
        model = copy.deepcopy(plain).train(training)
        prepare_qat(model, weight=W3, exclude=["lm_head"])
        apply_ptq(model, "gptq", DATA)
        weights.append(torch.cat([layer.weight.flatten() for _, layer in qat_layers(model)]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
@pytest.mark.parametrize("stop", ["nan", "interrupt"])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(method: str, stop: str) -> None:
    model = tiny("llama")
    prepare_qat(model, weight=W3_CHANNEL, exclude=["lm_head"])
    calls = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) > len(DATA):  # the whole model has run, and the first block is done
            raise KeyboardInterrupt

    if stop == "nan":
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight[3] = torch.nan
    else:
        model.model.layers[1].register_forward_hook(interrupt)
    before = copy.deepcopy(model.state_dict())
    match = rf"{method}: the input of layer 'model.layers.1.self_attn.q_proj' is non-finite" if stop == "nan" else None
    with pytest.raises(QatkitError if stop == "nan" else KeyboardInterrupt, match=match):
        apply_ptq(model, method, DATA)
    assert all(torch.equal(value, before[key]) or "input_layernorm" in key for key, value in model.state_dict().items())
    assert all(layer.weight_fake_quant is not None for _, layer in qat_layers(model))


def test_mistakes_are_named_before_anything_runs() -> None:
    def forward(batch: Tensor) -> None:
        raise AssertionError("the model ran")

    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2), 2)
    cases: list[tuple[Any, nn.Module, QuantSpec, list[Tensor], str]] = [
        ("gtpq", mlp(), W3_CHANNEL, DATA, "method: unknown PTQ method 'gtpq'; did you mean 'gptq'"),
        ("gptq", mlp(), W3_CHANNEL, [], "batches: gptq needs at least one batch, but got none"),
        ("gptq", mlp(), QuantSpec(3), DATA, r"layer '0': gptq sets scales, .* use observer: mse .* or lsq"),
        ("awq", mlp(), QuantSpec(3), DATA, r"layer '0': awq sets scales, .* use observer: mse .* or lsq"),
        ("mse", mlp(), QuantSpec(3), DATA, r"layer '0': mse sets scales, .* use observer: mse .* or lsq"),
        (
            "awq",
            cnn(),
            W3_CHANNEL,
            DATA,
            r"awq does not support Sequential in Sequential, .* use gptq",
        ),
        (
            "smoothquant",
            encoder,
            QuantSpec(8),
            DATA,
            "TransformerEncoderLayer in TransformerEncoder, whose layer order",
        ),
    ]
    for method, model, spec, batches, message in cases:
        prepare_qat(model, weight=spec, exclude=["*.self_attn*"] if model is encoder else [])
        with pytest.raises(QatkitError, match=message):
            apply_ptq(model, method, batches, forward)


def test_a_method_that_sets_weights_is_refused_where_none_is_quantized() -> None:
    for method in ("rtn", "mse", "gptq", "awq"):
        model = mlp()
        prepare_qat(model, activation=A8)
        with pytest.raises(QatkitError, match=f"{method} sets weights .* no weight is quantized; add a weight"):
            apply_ptq(model, method, DATA)  # type: ignore[arg-type]


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(QatkitError, match="gptq: the model has no fake-quantized layer; call prepare_qat first"):
        apply_ptq(mlp(), "gptq", [torch.randn(8, 16)])


def test_ranges_need_nothing_where_they_are_computed_and_blocks_may_stay_plain() -> None:
    model = mlp()
    prepare_qat(model, weight=QuantSpec(8))
    assert apply_ptq(model, "rtn", []) == []
    llama = tiny("llama")
    names = prepare_qat(llama, weight=W3, exclude=["lm_head", "model.layers.0.*"])
    forwards = []
    done = apply_ptq(llama, "awq", DATA, lambda batch: forwards.append(llama(batch)))
    assert sorted(done) == sorted(names)
    assert len(forwards) == len(DATA)  # block by block, the plain one among them


def test_inputs_that_are_already_calibrated_are_not_made_stale() -> None:
    model = mlp()
    prepare_qat(model, weight=W3_CHANNEL, activation=A8)
    calibrate(model, [torch.randn(8, 16)])
    with pytest.raises(
        QatkitError, match=r"smoothquant changes the input range of layer '0', .* call apply_ptq before calibrate"
    ):
        apply_ptq(model, "smoothquant", [torch.randn(8, 16)])
    apply_ptq(model, "gptq", [torch.randn(8, 16)])


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = mlp()
        prepare_qat(model, weight=W3_CHANNEL)
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(QatkitError, match="the weight of layer '0' is sharded; call apply_ptq before fully_shard"):
            apply_ptq(model, "gptq", [torch.randn(8, 16)])
    finally:
        dist.destroy_process_group()
