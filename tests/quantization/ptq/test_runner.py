"""Whole models: every method, block by block, and nothing changed when it fails."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatkit import QatkitWarning, QuantSpec, calibrate, prepare_qat
from qatkit.quantization.estimators import mse_qparams
from qatkit.quantization.prepare import qat_layers
from qatkit.quantization.ptq.awq import awq_clip
from qatkit.quantization.ptq.gptq import gptq
from qatkit.quantization.ptq.runner import apply_ptq
from tests.quantization.ptq.models import CONFIGS, DATA, W3, W3_CHANNEL, cnn, mlp, output, tiny, tokens

HEAD = {"llama": ["lm_head"], "gpt2": ["lm_head"]}


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
        assert sorted(apply_ptq(prepared, method, DATA)) == sorted(names)
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
        assert apply_ptq(prepared, method, batches) == names
        errors[method] = error(prepared, exact, unseen)
    assert errors["gptq"] < 0.8 * errors["mse"]
    assert errors.get("awq", 0.0) < errors["rtn"]


def test_a_block_is_rounded_on_what_the_rounded_blocks_before_it_give() -> None:
    """Against the same weights computed from forward passes of the whole model, the first block already rounded."""
    plain = tiny("llama")
    model = copy.deepcopy(plain)
    prepare_qat(model, weight=W3, exclude=["lm_head"])
    forwards = []
    apply_ptq(model, "gptq", DATA, lambda batch: forwards.append(model(batch)))
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
        apply_ptq(model, "gptq", DATA)
        for name, layer in qat_layers(model):
            assert torch.equal(layer.fake_quantized_weight(), layer.weight), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_relu"])
@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_scales_that_move_keep_the_function(name: str, method: str) -> None:
    plain = tiny(name)
    model = copy.deepcopy(plain)
    exclude = [] if name == "bert_relu" else ["lm_head"]
    prepare_qat(model, weight=W3_CHANNEL, activation=QuantSpec(8, strategy="token"), exclude=exclude)
    apply_ptq(model, method, DATA)
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
        apply_ptq(model, method, DATA)
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
        apply_ptq(prepared, method, DATA)
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
        apply_ptq(model, "gptq", DATA)
        most[blocks] = max(counts)
    assert len(DATA) <= most[2] < 4 * len(DATA)
    assert most[8] == most[2]


@pytest.mark.parametrize("order", [(2, 1, 0), (0, 1, 1, 2), (0, 2)])
def test_blocks_that_do_not_run_one_after_the_other_are_treated_together(order: tuple[int, ...]) -> None:
    model = Blocks(order)
    names = prepare_qat(model, weight=W3_CHANNEL)
    x = image_like(64, 16)
    if 1 in order:
        assert apply_ptq(model, "gptq", [x]) == names
        return
    with pytest.warns(QatkitWarning, match=r"blocks\.1\.1 \(no input reached the layer\), blocks\.1\.3"):
        assert apply_ptq(model, "gptq", [x]) == [name for name in names if ".1." not in name]


def test_what_happens_between_blocks_is_noticed_and_blocks_may_write_into_their_input() -> None:
    x = image_like(64, 16)
    forwards = []
    between = Blocks((0, 1, 2), between=0.5)
    prepare_qat(between, weight=W3_CHANNEL)
    apply_ptq(between, "gptq", [x], lambda batch: forwards.append(between(batch)))
    assert len(forwards) == 2  # once to look, once for all layers together
    results = []
    for inplace in (False, True):
        torch.manual_seed(3)
        model = Blocks((0, 1, 2), inplace)
        prepare_qat(model, weight=W3_CHANNEL)
        apply_ptq(model, "gptq", [x.clone()], lambda batch, model=model: model(batch.clone()))
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
    done = apply_ptq(model, "gptq", DATA, forward)
    assert dtypes == {torch.bfloat16}
    assert sorted(done) == sorted(names)
    assert done[-1] == "lm_head"
