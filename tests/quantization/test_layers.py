"""Layers of every kind: each computes with the rounded weight that it says it has, and goes back to what it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit import (
    QatkitError,
    QuantSpec,
    Scheme,
    calibrate,
    prepare_qat,
    scheme,
    strip_qat,
)
from qatkit.quantization.estimators import computed_qparams
from qatkit.quantization.monitoring import LayerWatch
from qatkit.quantization.prepare import fake_quantizers, qat_layers, quantized_weights
from qatkit.quantization.state import load_quantizers, save_quantizers
from tests.quantization.families import A8, TOKEN, TOKENS, W4, Model, gpt2, llama, mixtral, rounded


@pytest.mark.parametrize(
    ("layer", "x", "compute"),
    [
        (nn.Linear(8, 6), torch.randn(3, 8), lambda m, x, w: F.linear(x, w, m.bias)),
        (nn.Conv1d(4, 6, 3, groups=2), torch.randn(2, 4, 9), lambda m, x, w: F.conv1d(x, w, m.bias, groups=2)),
        (nn.Conv2d(4, 8, 3, groups=4), torch.randn(2, 4, 5, 5), lambda m, x, w: F.conv2d(x, w, m.bias, groups=4)),
        (nn.Conv2d(2, 4, 3, padding=1), torch.randn(2, 2, 5, 5), lambda m, x, w: F.conv2d(x, w, m.bias, padding=1)),
        (nn.Conv3d(2, 4, 2, groups=2), torch.randn(1, 2, 3, 3, 3), lambda m, x, w: F.conv3d(x, w, m.bias, groups=2)),
        (nn.EmbeddingBag(9, 5, mode="sum"), torch.arange(8).view(2, 4), lambda m, x, w: F.embedding(x, w).sum(1)),
        (nn.Embedding(9, 5, padding_idx=0), torch.arange(9), lambda m, x, w: F.embedding(x, w)),
        (transformers.pytorch_utils.Conv1D(6, 8), torch.randn(2, 3, 8), lambda m, x, w: x @ w.t() + m.bias),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_computes_with_its_rounded_weight_and_is_plain_again_after_stripping(
    layer: nn.Module, x: Tensor, compute: Callable[[Any, Tensor, Tensor], Tensor]
) -> None:
    model = nn.Sequential(layer)
    kind, plain, keys = type(layer), model(x), list(model.state_dict())
    assert prepare_qat(model, W4, include=["0"]) == ["0"]
    assert list(model.state_dict()) == keys
    matrix = layer.weight.t() if kind.__name__ == "Conv1D" else layer.weight  # type: ignore[operator]
    torch.testing.assert_close(model(x), compute(layer, x, rounded(matrix)), rtol=1e-6, atol=1e-6)
    model(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0  # type: ignore[union-attr]
    copy.deepcopy(model)(x)
    assert strip_qat(model) == ["0"]
    assert type(layer) is kind
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2), torch.randn(2, 4, 5)),
        (nn.ConvTranspose2d(6, 3, 3, padding=1, dilation=2, bias=False), torch.randn(2, 6, 5, 5)),
    ],
    ids=["1d", "2d"],
)
def test_a_transposed_convolution_has_one_scale_per_output_channel(layer: Any, x: Tensor) -> None:
    plain, model = copy.deepcopy(layer), nn.Sequential(layer)
    prepare_qat(model, W4, A8)
    calibrate(model, [x])
    for channel in range(plain.out_channels):
        per_group, inputs = plain.out_channels // plain.groups, plain.in_channels // plain.groups
        rows = slice(channel // per_group * inputs, (channel // per_group + 1) * inputs)
        one = plain.weight.data[rows, channel % per_group]
        plain.weight.data[rows, channel % per_group] = rounded(one[None], W4)[0]
    assert torch.equal(layer.fake_quantized_weight(), plain.weight)
    if plain.bias is not None:
        plain.bias.data = layer.shipped()["bias"]
    quantized = layer.input_fake_quant(x)
    assert torch.equal(layer(x), plain(quantized))
    size = [length - 1 for length in plain(x).shape[2:]] if plain.stride[0] > 1 else None
    assert torch.equal(layer(x, size), plain(quantized, size))
    layer.set_matrix(layer.matrix * 2)
    strip_qat(model)
    assert not torch.equal(layer.weight, plain.weight)
    assert layer.weight.shape == plain.weight.shape


def test_a_transposed_convolution_that_shares_its_weight_with_a_convolution_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 3))
    model[1].weight = model[0].weight
    with pytest.raises(QatkitError, match="layers '0' and '1' share one weight, but the outputs of one are the inputs"):
        prepare_qat(model, W4)


def test_an_embedding_bag_is_named_like_an_embedding_and_keeps_its_offsets_and_weights() -> None:
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(9, 5, mode="sum", include_last_offset=True), "head": nn.Linear(5, 5)})
    plain: Any = copy.deepcopy(model.bag)
    assert prepare_qat(copy.deepcopy(model), W4) == ["head"]
    with pytest.raises(
        QatkitError, match="the weight of layer 'bag' can be quantized, because the inputs are integers"
    ):
        prepare_qat(model, W4, A8, include=["bag"])
    prepare_qat(model, W4, include=["bag"])
    plain.weight.data = rounded(plain.weight.data)
    arguments = (torch.arange(6), torch.tensor([0, 2, 6]), torch.rand(6))
    assert torch.equal(model.bag(*arguments), plain(*arguments))


def test_gpt2_has_its_conv1d_layers_quantized_and_not_its_head_alone() -> None:
    model = gpt2()
    names = prepare_qat(model, QuantSpec(4, strategy="group", group_size=16), TOKEN, exclude=["lm_head"])
    assert len(names) == 8
    assert {name.rpartition(".")[2] for name in names} == {"c_attn", "c_proj", "c_fc"}
    model(TOKENS, labels=TOKENS).loss.backward()
    layer = model.get_submodule("transformer.h.0.mlp.c_fc")
    assert layer.weight_fake_quant.qparams(layer.matrix)[0].shape == (128, 2)  # type: ignore[operator, union-attr]


def test_embeddings_have_to_be_named_and_tied_heads_share_their_quantizer() -> None:
    model = gpt2()
    assert "transformer.wte" not in prepare_qat(model, W4, exclude=["lm_head"])
    model = gpt2()
    prepare_qat(model, QuantSpec(4, observer="lsq"), include=["*", "*.wte"])
    layers = dict(qat_layers(model))
    assert layers["transformer.wte"].weight_fake_quant is layers["lm_head"].weight_fake_quant
    logits = model(TOKENS).logits
    model.lm_head.weight_fake_quant.scale.data.mul_(2)
    assert not torch.equal(model(TOKENS).logits, logits)
    assert torch.equal(layers["transformer.wte"].fake_quantized_weight(), layers["lm_head"].fake_quantized_weight())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_fused_experts_are_quantized_however_they_are_computed(implementation: str) -> None:
    model = mixtral()
    model.set_experts_implementation(implementation)
    expected = copy.deepcopy(model)
    names = prepare_qat(model, W4, exclude=["lm_head"])
    assert "model.layers.0.mlp.experts" in names
    assert "model.layers.0.mlp.gate" not in names
    with torch.no_grad():
        for name, module in expected.named_modules():
            if type(module) is nn.Linear and name != "lm_head":
                module.weight.copy_(rounded(module.weight))
            for key in ("gate_up_proj", "down_proj"):
                if key in module._parameters:
                    weight = getattr(module, key)
                    weight.copy_(torch.stack([rounded(expert) for expert in weight]))
        torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits, rtol=1e-5, atol=1e-5)
    model(TOKENS, labels=TOKENS).loss.backward()
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert experts._parameters["gate_up_proj"].grad.abs().sum() > 0  # type: ignore[union-attr]
    assert sum("experts" in name for name, _, _ in quantized_weights(model)) == 2
    strip_qat(model)
    assert type(experts).__name__ == "MixtralExperts"


def test_experts_with_transposed_weights_are_scaled_by_output() -> None:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, use_cache=False,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).eval()
    prepare_qat(model, W4, include=["*.experts"])
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    expected = torch.stack([rounded(weight.t()).t() for weight in experts._parameters["down_proj"]])
    assert torch.equal(experts.fake_quantized("down_proj"), expected)
    model(TOKENS, labels=TOKENS).loss.backward()


def test_experts_can_have_no_quantized_inputs_and_the_error_says_what_to_do() -> None:
    with pytest.raises(
        QatkitError,
        match=r"activation: only the weight of layer 'model.layers.0.mlp.experts' can be quantized, because fused",
    ):
        prepare_qat(mixtral(), W4, TOKEN, exclude=["lm_head"])
    names = prepare_qat(mixtral(), W4, TOKEN, exclude=["lm_head"], layers={"*.experts": Scheme(W4)})
    assert "model.layers.0.mlp.experts" in names


def test_the_last_glob_that_matches_decides_how_a_layer_is_quantized() -> None:
    model = llama()
    two, eight = Scheme(QuantSpec(2)), Scheme(QuantSpec(8), TOKEN)
    prepare_qat(model, W4, exclude=["lm_head"], layers={"*.mlp.*": two, "*.down_proj": eight})
    bits = {name.rpartition(".")[2]: layer.weight_fake_quant.spec.num_bits for name, layer in qat_layers(model)}  # type: ignore[union-attr]
    assert bits == {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4, "gate_proj": 2, "up_proj": 2, "down_proj": 8}
    model = llama()
    assert prepare_qat(model, layers={"*.down_proj": eight}) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


@pytest.mark.parametrize("make", [llama, gpt2, mixtral])
def test_quantizers_of_every_kind_come_back_from_disk(make: Callable[[], Model], tmp_path: Any) -> None:
    model = make()
    learned = QuantSpec(4, observer="lsq")
    nvfp4 = QuantSpec(4, type="float", strategy="group", group_size=16, scale_dtype="float8_e4m3fn")
    layers = {"*.0.*attn*.*": Scheme(nvfp4, nvfp4), "*experts": Scheme(learned)} if make is not gpt2 else {}
    if make is llama:
        del layers["*experts"]
    names = prepare_qat(model, learned, exclude=["lm_head"], layers=layers, kv_cache=QuantSpec(8, strategy="tensor"))
    calibrate(model, [TOKENS])
    with torch.no_grad():
        for _, fake_quant in fake_quantizers(model):
            if isinstance(fake_quant.scale, nn.Parameter):
                fake_quant.scale.mul_(1.1)
        expected = model(TOKENS).logits
    save_quantizers(model, tmp_path / "quantizers.safetensors")
    fresh = make()
    assert set(load_quantizers(fresh, tmp_path / "quantizers.safetensors")) == set(names)
    with torch.no_grad():
        assert torch.equal(fresh(TOKENS).logits, expected)


def test_experts_read_as_their_parameters_outside_of_the_forward_pass() -> None:
    # FSDP2 finds what it shards by attribute: a rounded tensor there would never be trained
    model = mixtral()
    prepare_qat(model, W4, include=["*.experts"])
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    assert experts.gate_up_proj is experts._parameters["gate_up_proj"]
    assert model.get_parameter("model.layers.0.mlp.experts.down_proj") is experts._parameters["down_proj"]
    with pytest.raises(QatkitError, match=r"weight.strategy: 'tensor' is not supported for the fused experts"):
        prepare_qat(mixtral(), QuantSpec(4, strategy="tensor"), include=["*.experts"])


@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_layers_whose_class_is_made_on_the_fly_can_be_pickled(make: Callable[[], Model]) -> None:
    model = make()
    prepare_qat(model, W4, exclude=["lm_head"])
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert strip_qat(again) == strip_qat(model)


def test_quantizers_that_were_never_calibrated_are_refused_on_loading(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    fresh = copy.deepcopy(model)
    prepare_qat(model, W4, QuantSpec(8, strategy="tensor"))
    save_quantizers(model, tmp_path / "q.safetensors")
    with pytest.raises(
        QatkitError,
        match=r"q\.safetensors: the input of layer '0' has no scale, because it was saved before calibration",
    ):
        load_quantizers(fresh, tmp_path / "q.safetensors")


def test_ragged_blocks_have_the_mean_magnitude_of_their_own_values() -> None:
    spec = QuantSpec(2, type="ternary", strategy="block", block_structure=(2, 2), observer="absmean")
    assert computed_qparams(torch.ones(3, 3), spec)[0].tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("name", ["FP8_BLOCK", "MXFP8", "NVFP4", "Q4_0"])
def test_the_monitor_observes_every_format(name: str) -> None:
    model = nn.Sequential(nn.Linear(256, 128))
    prepare_qat(model, scheme(name).weight)
    watch = LayerWatch()
    for _ in range(3):
        numbers = watch.observe(model[0])
        assert numbers[:3].isfinite().all()
    assert watch.histogram().sum() == 128 * 256
