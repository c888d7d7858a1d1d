"""Swapping layers: what changes, what stays, and what is refused."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from qatkit import (
    QatkitError,
    QatkitWarning,
    QATLinear,
    QuantSpec,
    Scheme,
    calibrate,
    fake_quantize,
    prepare_qat,
    scheme,
    strip_qat,
)
from qatkit.quantization.estimators import computed_qparams
from qatkit.quantization.layers import SWAPS
from qatkit.quantization.selection import select
from qatkit.quantization.state import load_quantizers, save_quantizers

W4, LSQ = QuantSpec(num_bits=4), QuantSpec(num_bits=4, observer="lsq")
A8 = QuantSpec(symmetric=False, strategy="tensor")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.head(self.block(self.embedding(tokens)))


def test_a_swap_keeps_parameters_names_ties_hooks_and_random_numbers() -> None:
    model = Tied()
    before, keys, state = list(model.parameters()), list(model.state_dict()), torch.get_rng_state()
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    assert prepare_qat(model, LSQ) == ["block.0", "head"]
    assert torch.equal(torch.get_rng_state(), state)
    assert [p for p in model.parameters() if any(p is q for q in before)] == before
    assert model.head.weight is model.embedding.weight
    assert [key for key in model.state_dict() if "fake_quant" not in key] == keys
    model(torch.arange(12))
    assert calls


def test_stripping_gives_back_the_plain_model_with_its_latent_weights() -> None:
    model = Tied()
    before, structure = copy.deepcopy(model.state_dict()), str(model)
    prepare_qat(model, LSQ, A8)
    assert strip_qat(model) == ["block.0", "head"]
    assert str(model) == structure
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_quantized_layer_computes_with_the_fake_quantized_weight_and_input() -> None:
    layer = nn.Linear(8, 4)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    x = torch.randn(5, 8)
    prepare_qat(layer_in := nn.Sequential(layer), W4, QuantSpec(strategy="token"))
    token = QuantSpec(strategy="token")
    expected = F.linear(
        fake_quantize(x, *computed_qparams(x, token), token),
        fake_quantize(weight, *computed_qparams(weight, W4), W4),
        bias,
    )
    assert torch.equal(layer_in(x), expected)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_a_quantized_convolution_keeps_stride_groups_and_padding(padding_mode: str) -> None:
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, padding_mode=padding_mode)
    model, x = nn.Sequential(copy.deepcopy(conv)), torch.randn(2, 4, 9, 9)
    prepare_qat(model, W4)
    conv.weight.data = fake_quantize(conv.weight.detach(), *computed_qparams(conv.weight, W4), W4)
    assert torch.equal(model(x), conv(x))


def test_a_prepared_model_can_be_copied_pickled_and_compiled_without_a_graph_break() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    prepare_qat(model, LSQ, A8)
    x = torch.randn(2, 1, 8, 8)
    calibrate(model, [x])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), model(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))
    ours, theirs = (torch.autograd.grad(run(x).square().sum(), list(model.parameters())) for run in (compiled, model))
    for found, expected in zip(ours, theirs, strict=True):  # torch 2.11 can lose one on the way without a word
        torch.testing.assert_close(found, expected)
        assert expected.any()


def test_saved_quantizers_load_into_a_plain_model_and_give_the_same_outputs(tmp_path: Path) -> None:
    for weight in (W4, LSQ, QuantSpec(3, symmetric=False), QuantSpec(4, strategy="group", group_size=8)):
        model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        plain, x = copy.deepcopy(model), torch.randn(3, 16)
        prepare_qat(model, weight, A8)
        calibrate(model, [x])
        save_quantizers(model, tmp_path / "quantizers.safetensors")
        assert load_quantizers(plain, tmp_path / "quantizers.safetensors") == ["0", "2"]
        assert torch.equal(plain(x), model(x))


def test_scales_of_other_weights_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    prepare_qat(model, W4)
    save_quantizers(model, tmp_path / "q.safetensors")
    with pytest.raises(QatkitError, match=r"q\.safetensors: the weight of layer '0' does not match its recorded scale"):
        load_quantizers(nn.Sequential(nn.Linear(16, 8)), tmp_path / "q.safetensors")


def test_a_bitsandbytes_4bit_layer_is_a_linear_and_is_not_swapped() -> None:
    model = nn.Sequential(nn.Linear(8, 8), bitsandbytes.nn.Linear4bit(8, 8))
    assert isinstance(model[1], nn.Linear)
    with pytest.warns(QatkitWarning, match=r"not quantized, .*: 1 \(Linear4bit\)"):
        assert prepare_qat(model, W4) == ["0"]
    assert type(model[0]) is QATLinear
    with pytest.raises(QatkitError, match="'1', a Linear4bit, which cannot be quantized"):
        select(nn.Sequential(nn.Linear(8, 8), bitsandbytes.nn.Linear4bit(8, 8)), QuantSpec(), include=["1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ["block.1"]}, r"include\[0\]: 'block.1' matches no layer; did you mean 'block.0'"),
        ({"include": ["*"], "exclude": ["hed"]}, r"exclude\[0\]: 'hed' matches no layer; did you mean 'head'"),
        ({"include": ["norm"]}, r"'norm' selects 'norm', a LayerNorm, which cannot be quantized"),
        ({"include": "head"}, r"include: 'head' is not a list of globs; pass \['head'\]"),
        ({"weight": "W4A16"}, r"weight: 'W4A16' is not a QuantSpec; pass QuantSpec\(num_bits=8\)"),
        (
            {"weight": scheme("W8A8")},
            r"weight: expected a QuantSpec, but got a Scheme, .*; pass weight=SCHEME.weight",
        ),
        ({"layers": {"head": W4}}, r"layers\['head'\]: QuantSpec\(.*\) is not a Scheme; pass scheme\('W8A16'\)"),
        ({"weight": QuantSpec(strategy="token")}, "weight.strategy: 'token' is supported only for activations"),
        (
            {"weight": QuantSpec(observer="kl")},
            "weight.observer: 'kl' is supported only for activations; use minmax, mse or lsq",
        ),
        (
            {"activation": QuantSpec(2, type="ternary", observer="mse")},
            "activation.strategy: 'channel' is supported only for weights",
        ),
        (
            {"activation": QuantSpec(strategy="group", group_size=4, observer="mse")},
            "activation.observer: 'mse' is not supported with strategy 'group'",
        ),
        (
            {"include": ["*", "embedding"], "activation": QuantSpec(strategy="token")},
            "activation: only the weight of layer 'embedding' can be quantized, because the inputs are integers",
        ),
        (
            {"layers": {"*ead": Scheme(W4), "block.*": Scheme(LSQ), "hea": Scheme(LSQ)}},
            r"layers\['hea'\]: 'hea' matches no",
        ),
        (
            {"include": ["*", "embedding"], "layers": {"head": Scheme(LSQ)}},
            "layers 'embedding' and 'head' share one weight",
        ),
        ({"exclude": ["*"]}, r"and exclude=\['\*'\] select no layer"),
        ({"weight": None}, "weight: neither weight nor activation is quantized"),
        (
            {"weight": QuantSpec(4, strategy="group", group_size=3)},
            r"weight.group_size: 3 does not divide in_features=8 of layer 'block.0'; use one of 4, 8",
        ),
    ],
)
def test_a_selection_that_cannot_be_done_is_refused_and_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = Tied()
    with pytest.raises(QatkitError, match=message):
        prepare_qat(model, **({"weight": W4} | options))
    assert not any(type(module) in SWAPS.values() for module in model.modules())


def test_a_module_without_a_weight_of_its_own_is_named_when_a_pattern_selects_it() -> None:
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"rnn": nn.LSTMCell(8, 8), "attention": Own(8, 2), "head": nn.Linear(8, 8)})
    with pytest.raises(QatkitError, match="'rnn' selects 'rnn', a LSTMCell, which cannot be quantized"):
        prepare_qat(model, W4, include=["rnn"])
    with pytest.raises(QatkitError, match=r"'att\*n' selects 'attention', a Own, which cannot"):
        prepare_qat(model, W4, include=["att*n"])
    with pytest.raises(QatkitError, match=r"'\*\.out_proj' selects 'attention.out_proj', a NonDynamically.* cannot"):
        prepare_qat(model, W4, include=["*.out_proj"])  # a forward that may read its weight directly


def test_layers_that_a_glob_passes_over_are_named_in_a_warning() -> None:
    config = transformers.Llama4TextConfig(hidden_size=8, intermediate_size=8, num_local_experts=2)
    model = nn.ModuleDict(
        {
            "experts": Llama4TextExperts(config),  # transformers does not mark these as fused experts
            "up": nn.ConvTranspose3d(2, 2, 1),
            "rnn": nn.GRUCell(8, 8),
            "head": nn.Linear(8, 8),
            "norm": nn.LayerNorm(8),
        }
    )
    missed = r"not quantized.*: experts \(Llama4TextExperts\), up \(ConvTranspose3d\), rnn \(GRUCell\); they contain"
    with pytest.warns(QatkitWarning, match=missed):
        assert prepare_qat(model, W4) == ["head"]
    strip_qat(model)
    assert prepare_qat(model, W4, exclude=["experts", "up", "rnn"]) == ["head"]  # no warning: that would be an error


def test_a_second_preparation_and_a_weight_that_is_not_finite_are_refused() -> None:
    whole = nn.Sequential(nn.Linear(4, 4))
    prepare_qat(whole, W4)
    with pytest.raises(QatkitError, match="layer '0' is already fake-quantized; exclude the layer, or call strip_qat"):
        prepare_qat(whole, W4)
    model = Tied()
    prepare_qat(model, W4, include=["head"])
    with pytest.raises(QatkitError, match="layer 'head' is already fake-quantized"):
        prepare_qat(model, W4)
    model = Tied()
    model.block[0].weight.data[0, 0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(QatkitError, match=r"the weight of layer 'block\.0' has non-finite values; use a checkpoint"):
        prepare_qat(model, W4)


def test_a_bias_is_rounded_to_the_grid_that_integer_kernels_add_it_on_and_still_learns() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    prepare_qat(model, W4, A8)
    calibrate(model, [torch.randn(16, 8)])
    layer: Any = model[0]
    _, _, bias = layer.operands(torch.randn(2, 8))
    step = layer.weight_fake_quant.qparams(layer.weight)[0].flatten() * layer.input_fake_quant.scale
    assert torch.equal(bias, (layer.bias / step).round() * step)
    assert not torch.equal(bias, layer.bias)
    model(torch.randn(2, 8)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((4,), 2.0))


def test_a_bias_survives_a_channel_whose_scale_is_the_smallest_there_is() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    prepare_qat(model, LSQ, A8)
    calibrate(model, [torch.randn(16, 8)])
    layer: Any = model[0]
    layer.weight_fake_quant.scale.data[1] = 0.0
    assert torch.equal(layer.operands(torch.randn(2, 8))[2][1], layer.bias[1])
    assert model(torch.randn(2, 8)).isfinite().all()


def test_the_fused_encoder_layer_of_torch_does_not_bypass_the_quantization() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 1).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        plain = model(x)
    prepare_qat(model, QuantSpec(num_bits=2), include=["*linear*"])
    expected = model(x)
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-6)
        assert not torch.allclose(expected, plain, atol=1e-2)
        strip_qat(model)
        assert torch.equal(model(x), plain)


def test_a_layer_under_two_names_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    from qatkit.run.record import StageRecord
    from qatkit.run.stage_files import load_stage, save_stage

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

    model, fresh = Twice(), Twice()
    prepare_qat(model, LSQ)
    save_stage(tmp_path, model, StageRecord("s", "f", {}))
    load_stage(tmp_path, fresh, quantizers=True)
    assert torch.equal(fresh.second.fake_quantized_weight(), model.first.fake_quantized_weight())  # type: ignore[operator]


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (
            prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
            {},
            "the weight of layer '0' is computed by a hook",
        ),
        (nn.Linear(4, 0), {}, r"the weight of layer '0' with shape \[0, 4\] is empty"),
        (
            nn.Conv2d(1, 1, 3),
            {"activation": QuantSpec(strategy="token")},
            "activation.strategy: 'token' is supported only for linear layers, but layer '0' is a Conv2d",
        ),
        (
            nn.Linear(6, 4),
            {"activation": QuantSpec(strategy="group", group_size=4)},
            "activation.group_size: 4 does not divide in_features=6 of layer '0'; use one of 6",
        ),
        (nn.Linear(4, 4), {"activation": QuantSpec(8)}, "activation.strategy: 'channel' is supported only for weights"),
    ],
)
def test_a_layer_that_cannot_be_quantized_so_is_refused_by_name(layer: Any, options: Any, message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        prepare_qat(nn.Sequential(layer), **({"weight": W4} | options))
