"""Whole models: every method, block by block, and nothing changed when it fails."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import MixtralConfig, MixtralForCausalLM

from qatkit import QatkitError, QatkitWarning, QuantSpec, calibrate, prepare_qat
from qatkit.quantization.initialisers.awq import awq_clip
from qatkit.quantization.initialisers.gptq import gptq
from qatkit.quantization.initialisers.runner import Method, initialise
from qatkit.quantization.observers import mse_qparams
from qatkit.quantization.prepare import qat_layers
from tests.quantization.initialisers.models import CONFIGS, output, tiny, tokens

W3 = QuantSpec(3, observer="mse", strategy="group", group_size=16)
W3_CHANNEL = QuantSpec(3, observer="lsq")
A8 = QuantSpec(8, symmetric=False, strategy="tensor")
HEAD = {"llama": ["lm_head"], "gpt2": ["lm_head"]}
DATA = [tokens(seed) for seed in range(4)]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 4),
    ).eval()


def image_like(*shape: int) -> Tensor:
    """Values that resemble their neighbours, so that rounding errors can make up for each other."""
    return torch.randn(*shape).cumsum(-1) / 4


class Blocks(nn.Module):
    """Blocks in a ModuleList, run in a given order; each first changes its input, in place if told so."""

    def __init__(self, order: tuple[int, ...], inplace: bool = False, between: float | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ELU(inplace=inplace), *mlp()[:3], nn.Linear(32, 16)) for _ in range(3)
        )
        self.order, self.between = order, between

    def forward(self, x: Tensor) -> Any:
        for index in self.order:
            x = self.blocks[index](x)
            if self.between is not None:
                x = x * self.between
        return x


def error(model: nn.Module, exact: Tensor, batch: Tensor) -> float:
    """Squared error of the output, as a share of the output."""
    with torch.no_grad():
        result = model(batch)
    result = result if isinstance(result, Tensor) else result[0]
    return float((result - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "gpt2", "opt", "bert", "gemma3"])
def test_gptq_and_awq_start_closer_to_the_float_model_than_the_weights_alone_allow(name: str) -> None:
    model, unseen = tiny(name), tokens(9)
    exact = output(model, unseen)
    errors = {}
    for method in ("rtn", "mse", "gptq", "awq"):
        prepared = copy.deepcopy(model)
        exclude = ["lm_head"] if hasattr(model, "lm_head") else []
        names = prepare_qat(prepared, weight=W3, exclude=exclude)
        assert sorted(initialise(prepared, method, DATA)) == sorted(names)
        errors[method] = error(prepared, exact, unseen)
    assert errors["gptq"] < 0.9 * errors["mse"]
    assert errors["awq"] < errors["rtn"]


@pytest.mark.parametrize(("make", "shape"), [(mlp, (64, 16)), (cnn, (16, 3, 8, 8))])
def test_models_without_a_list_of_blocks_are_one_block(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model, batches, unseen = make(), [image_like(*shape) for _ in range(3)], image_like(*shape)
    exact = model(unseen).detach()
    errors = {}
    for method in ("rtn", "mse", "gptq", "awq"):
        prepared = copy.deepcopy(model)
        if method == "awq" and isinstance(model[0], nn.Conv2d):
            continue
        names = prepare_qat(prepared, weight=W3_CHANNEL)
        assert initialise(prepared, method, batches) == names
        errors[method] = error(prepared, exact, unseen)
    assert errors["gptq"] < 0.8 * errors["mse"]
    assert errors.get("awq", 0.0) < errors["rtn"]


def test_a_block_is_rounded_on_what_the_rounded_blocks_before_it_give() -> None:
    """Against the same weights computed from forward passes of the whole model, the first block already rounded."""
    plain = tiny("llama")
    model = copy.deepcopy(plain)
    prepare_qat(model, weight=W3, exclude=["lm_head"])
    forwards = []
    initialise(model, "gptq", DATA, lambda batch: forwards.append(model(batch)))
    assert len(forwards) == len(DATA)
    reference = copy.deepcopy(plain)
    reference.model.layers[0].load_state_dict(
        {k: v for k, v in model.model.layers[0].state_dict().items() if "fake_quant" not in k}
    )
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        layer = reference.model.layers[1].get_submodule(name)
        rows: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].flatten(0, 1)))
        for batch in DATA:
            output(reference, batch)
        handle.remove()
        x = torch.cat(rows)
        expected, _, _ = gptq(layer.weight, x.t() @ x, W3)
        torch.testing.assert_close(model.model.layers[1].get_submodule(name).weight, expected)


def test_what_it_sets_is_what_the_layers_compute_with() -> None:
    for spec in (
        W3,
        QuantSpec(4, symmetric=False, observer="lsq_plus", strategy="group", group_size=16),
        QuantSpec(4, type="float", strategy="group", group_size=16, scale_dtype="float8_e4m3fn", observer="mse"),
    ):
        model = tiny("llama")
        prepare_qat(model, weight=spec, exclude=["lm_head"])
        with torch.no_grad():  # a checkpoint that was loaded after
            for _, layer in qat_layers(model):
                layer.weight *= 3
        initialise(model, "gptq", DATA)
        for name, layer in qat_layers(model):
            assert torch.equal(layer.fake_quantized_weight(), layer.weight), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_relu"])
@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_scales_that_move_keep_the_function(name: str, method: Method) -> None:
    plain = tiny(name)
    model = copy.deepcopy(plain)
    exclude = [] if name == "bert_relu" else ["lm_head"]
    prepare_qat(model, weight=W3_CHANNEL, activation=QuantSpec(8, strategy="token"), exclude=exclude)
    initialise(model, method, DATA)
    own = {key: value for key, value in model.state_dict().items() if "fake_quant" not in key}
    moved = copy.deepcopy(plain)
    moved.load_state_dict(own)
    assert not all(torch.equal(own[key], value) for key, value in plain.state_dict().items())
    exact = output(plain, tokens(9))
    torch.testing.assert_close(output(moved, tokens(9)), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


def test_scales_belong_to_the_weights_after_the_move_and_to_their_inputs() -> None:
    plain = tiny("llama")
    for method in ("awq", "smoothquant"):
        model = copy.deepcopy(plain)
        prepare_qat(model, weight=W3, exclude=["lm_head"])
        initialise(model, method, DATA)
        moved = copy.deepcopy(plain)
        moved.load_state_dict({key: value for key, value in model.state_dict().items() if "fake_quant" not in key})
        for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"):
            layer = moved.model.layers[0].get_submodule(name)
            rows: list[Tensor] = []
            handle = layer.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].flatten(0, 1)))
            for batch in DATA:
                output(moved, batch)
            handle.remove()
            x = torch.cat(rows)
            if method == "awq":
                scale, _ = awq_clip(layer.weight, x.t() @ x / len(x), W3)
            else:
                scale, _ = mse_qparams(layer.weight, W3)
            own = model.model.layers[0].get_submodule(name).weight_fake_quant.scale
            assert torch.isclose(own, scale, rtol=1e-4).float().mean() > 0.98  # ties in the search fall either way


def test_smoothquant_helps_where_an_activation_has_outliers() -> None:
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[:2] *= 60
    exact = output(model, tokens(9))
    errors = {}
    for method in ("rtn", "smoothquant"):
        prepared = copy.deepcopy(model)
        prepare_qat(prepared, weight=QuantSpec(8), activation=QuantSpec(8, strategy="tensor"), exclude=["lm_head"])
        initialise(prepared, method, DATA)
        calibrate(prepared, DATA)
        errors[method] = error(prepared, exact, tokens(9))
    assert errors["smoothquant"] < 0.3 * errors["rtn"]


def test_the_activations_of_one_block_are_in_memory_at_a_time() -> None:
    most = {}
    for blocks in (2, 8):
        config = copy.deepcopy(CONFIGS["llama"])
        config.num_hidden_layers = blocks
        model = tiny("llama").__class__(config).eval()
        prepare_qat(model, weight=W3, exclude=["lm_head"])
        passed: list[weakref.ref[Tensor]] = []
        counts: list[int] = []

        def follow(
            _: nn.Module,
            args: tuple[Tensor],
            result: Tensor,
            passed: list[weakref.ref[Tensor]] = passed,
            counts: list[int] = counts,
        ) -> None:
            passed += [weakref.ref(args[0]), weakref.ref(result)]
            passed[:] = [reference for reference in passed if reference() is not None]
            counts.append(len({id(reference()) for reference in passed}))

        for module in (*model.model.layers, *(layer for _, layer in qat_layers(model))):
            module.register_forward_hook(follow)
        initialise(model, "gptq", DATA)
        most[blocks] = max(counts)
    assert len(DATA) <= most[2] < 4 * len(DATA)
    assert most[8] == most[2]


@pytest.mark.parametrize("order", [(2, 1, 0), (0, 1, 1, 2), (0, 2)])
def test_blocks_that_do_not_run_one_after_the_other_are_treated_together(order: tuple[int, ...]) -> None:
    model = Blocks(order)
    names = prepare_qat(model, weight=W3_CHANNEL)
    x = image_like(64, 16)
    if 1 in order:
        assert initialise(model, "gptq", [x]) == names
        return
    with pytest.warns(QatkitWarning, match=r"blocks\.1\.1 \(no input reached it\), blocks\.1\.3"):
        assert initialise(model, "gptq", [x]) == [name for name in names if ".1." not in name]


def test_what_happens_between_blocks_is_noticed_and_blocks_may_write_into_their_input() -> None:
    x = image_like(64, 16)
    forwards = []
    between = Blocks((0, 1, 2), between=0.5)
    prepare_qat(between, weight=W3_CHANNEL)
    initialise(between, "gptq", [x], lambda batch: forwards.append(between(batch)))
    assert len(forwards) == 2  # once to look, once for all layers together
    results = []
    for inplace in (False, True):
        torch.manual_seed(3)
        model = Blocks((0, 1, 2), inplace)
        prepare_qat(model, weight=W3_CHANNEL)
        initialise(model, "gptq", [x.clone()], lambda batch, model=model: model(batch.clone()))
        results.append(torch.cat([layer.weight.flatten() for _, layer in qat_layers(model)]))
    assert torch.equal(*results)


def test_layers_outside_of_the_blocks_come_last_and_may_run_under_autocast() -> None:
    model = tiny("llama")
    names = prepare_qat(model, weight=W3)

    def forward(batch: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(batch)

    dtypes = set()
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, args, result: dtypes.add(result.dtype))
    done = initialise(model, "gptq", DATA, forward)
    assert dtypes == {torch.bfloat16}
    assert sorted(done) == sorted(names)
    assert done[-1] == "lm_head"


def test_what_a_method_cannot_serve_keeps_its_own_scale_and_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(144, 2))
    prepare_qat(model, weight=W3_CHANNEL)
    before = model[0].weight_fake_quant.scale.clone()
    with pytest.warns(QatkitWarning, match=r"gptq: these layers keep their own scales: 0 \(grouped convolution\)$"):
        assert initialise(model, "gptq", [torch.randn(8, 4, 8, 8)]) == ["2", "4"]
    assert torch.equal(model[0].weight_fake_quant.scale, before)

    tied = tiny("gpt2")
    prepare_qat(tied, weight=QuantSpec(8, observer="mse"), include=["lm_head", "transformer.wte", "*.c_fc"])
    weight = tied.lm_head.weight.clone()
    with pytest.warns(QatkitWarning, match=r"transformer.wte \(embedding\), lm_head \(shared weight\)"):
        initialise(tied, "gptq", DATA)
    assert torch.equal(tied.lm_head.weight, weight)

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    moe = MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=64, num_hidden_layers=2, num_local_experts=2)).eval()
    prepare_qat(moe, weight=W3, exclude=["lm_head", "*.gate"])
    with pytest.warns(QatkitWarning, match=r"model.layers.0.mlp.experts.down_proj \(fused experts\)"):
        assert len(initialise(moe, "gptq", DATA)) == 8


def test_modes_caches_and_random_numbers_are_as_before() -> None:
    model = tiny("llama").train()
    model.model.norm.eval()
    prepare_qat(model, weight=W3, exclude=["lm_head"])
    state = torch.get_rng_state()

    def batches() -> Iterator[Tensor]:
        for _ in range(2):
            yield torch.randint(1, 64, (2, 8))  # draws random numbers

    initialise(model, "awq", batches())
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
        initialise(model, "gptq", DATA)
        weights.append(torch.cat([layer.weight.flatten() for _, layer in qat_layers(model)]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
@pytest.mark.parametrize("stop", ["nan", "interrupt"])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(method: Method, stop: str) -> None:
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
    match = rf"{method}: the input of layer 'model.layers.1.self_attn.q_proj' is not finite" if stop == "nan" else None
    with pytest.raises(QatkitError if stop == "nan" else KeyboardInterrupt, match=match):
        initialise(model, method, DATA)
    assert all(torch.equal(value, before[key]) or "input_layernorm" in key for key, value in model.state_dict().items())
    assert all(layer.weight_fake_quant is not None for _, layer in qat_layers(model))


def test_mistakes_are_named_before_anything_runs() -> None:
    def forward(batch: Tensor) -> None:
        raise AssertionError("the model ran")

    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2), 2)
    cases: list[tuple[Any, nn.Module, QuantSpec, list[Tensor], str]] = [
        ("gtpq", mlp(), W3_CHANNEL, DATA, "method: 'gtpq' is unknown; write one of rtn, mse, gptq, awq, smoothquant"),
        ("gptq", mlp(), W3_CHANNEL, [], "gptq: the data gave no batch"),
        ("gptq", mlp(), QuantSpec(3), DATA, r"layer '0': gptq sets scales, .* write observer: mse .* or lsq"),
        ("awq", mlp(), QuantSpec(3), DATA, r"layer '0': awq sets scales, .* write observer: mse .* or lsq"),
        ("mse", mlp(), QuantSpec(3), DATA, r"layer '0': mse sets scales, .* write observer: mse .* or lsq"),
        (
            "awq",
            cnn(),
            W3_CHANNEL,
            DATA,
            r"awq: nothing is known about .* layers of a Sequential of Sequential; .* use gptq",
        ),
        ("smoothquant", encoder, QuantSpec(8), DATA, "layers of a TransformerEncoderLayer of TransformerEncoder; "),
    ]
    for method, model, spec, batches, message in cases:
        prepare_qat(model, weight=spec, exclude=["*.out_proj"] if model is encoder else [])
        with pytest.raises(QatkitError, match=message):
            initialise(model, method, batches, forward)


def test_a_method_that_sets_weights_is_refused_where_none_is_quantized() -> None:
    for method in ("rtn", "mse", "gptq", "awq"):
        model = mlp()
        prepare_qat(model, activation=A8)
        with pytest.raises(QatkitError, match=f"{method}: it sets weights .* no weight is quantized; give a weight"):
            initialise(model, method, DATA)  # type: ignore[arg-type]


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(QatkitError, match="gptq: the model has no fake-quantized layer; call prepare_qat before"):
        initialise(mlp(), "gptq", [torch.randn(8, 16)])


def test_ranges_need_nothing_where_they_are_computed_and_blocks_may_stay_plain() -> None:
    model = mlp()
    prepare_qat(model, weight=QuantSpec(8))
    assert initialise(model, "rtn", []) == []
    llama = tiny("llama")
    names = prepare_qat(llama, weight=W3, exclude=["lm_head", "model.layers.0.*"])
    forwards = []
    done = initialise(llama, "awq", DATA, lambda batch: forwards.append(llama(batch)))
    assert sorted(done) == sorted(names)
    assert len(forwards) == len(DATA)  # block by block, the plain one among them


def test_inputs_that_are_already_calibrated_are_not_made_stale() -> None:
    model = mlp()
    prepare_qat(model, weight=W3_CHANNEL, activation=A8)
    calibrate(model, [torch.randn(8, 16)])
    with pytest.raises(QatkitError, match=r"layer '0': smoothquant .* call initialise before calibrate"):
        initialise(model, "smoothquant", [torch.randn(8, 16)])
    initialise(model, "gptq", [torch.randn(8, 16)])


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = mlp()
        prepare_qat(model, weight=W3_CHANNEL)
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(QatkitError, match="layer '0': its weight is sharded; call initialise before fully_shard"):
            initialise(model, "gptq", [torch.randn(8, 16)])
    finally:
        dist.destroy_process_group()
