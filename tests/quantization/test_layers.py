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
    fake_quantize,
    initialise,
    prepare_qat,
    scheme,
    strip_qat,
)
from qatkit.export.dense import export_dense
from qatkit.export.onnx import export_onnx
from qatkit.export.verify import verify
from qatkit.quantization.monitoring import LayerWatch
from qatkit.quantization.observers import computed_qparams
from qatkit.quantization.prepare import fake_quantizers, qat_layers, quantized_weights
from qatkit.quantization.state import load_quantizers, save_quantizers

W4 = QuantSpec(num_bits=4)
TOKEN = QuantSpec(strategy="token")
Model = transformers.PreTrainedModel


def rounded(weight: Tensor, spec: QuantSpec = W4) -> Tensor:
    return fake_quantize(weight, *computed_qparams(weight, spec), spec)


def llama(**changes: Any) -> Model:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False, **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> Model:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()


def mixtral() -> Model:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, use_cache=False,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


TOKENS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize(
    ("layer", "x", "compute"),
    [
        (nn.Linear(8, 6), torch.randn(3, 8), lambda m, x, w: F.linear(x, w, m.bias)),
        (nn.Conv1d(4, 6, 3, groups=2), torch.randn(2, 4, 9), lambda m, x, w: F.conv1d(x, w, m.bias, groups=2)),
        (nn.Conv2d(4, 8, 3, groups=4), torch.randn(2, 4, 5, 5), lambda m, x, w: F.conv2d(x, w, m.bias, groups=4)),
        (nn.Conv2d(2, 4, 3, padding=1), torch.randn(2, 2, 5, 5), lambda m, x, w: F.conv2d(x, w, m.bias, padding=1)),
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
    assert torch.equal(experts.rounded("down_proj"), expected)
    model(TOKENS, labels=TOKENS).loss.backward()


def test_experts_can_have_no_quantized_inputs_and_the_error_says_what_to_do() -> None:
    with pytest.raises(QatkitError, match=r"experts': fused experts route their inputs inside, so only its weight"):
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


def test_a_dynamic_input_is_quantized_once_for_all_layers_that_read_it_and_let_go_of() -> None:
    model = llama()
    prepare_qat(model, W4, TOKEN, exclude=["lm_head"])
    alone = llama()
    prepare_qat(alone, W4, TOKEN, exclude=["lm_head"])
    calls = {"shared": 0, "alone": 0}

    def count(key: str) -> Callable[..., Any]:
        def counted(self: Any, x: Tensor) -> Any:
            calls[key] += 1
            return type(self)._rounded(self, x)

        return counted

    for key, one in (("shared", model), ("alone", alone)):
        for _, fake_quant in fake_quantizers(one):
            if fake_quant.role == "activation":
                fake_quant._rounded = count(key).__get__(fake_quant)  # type: ignore[method-assign]
                if key == "alone":
                    for module in one.modules():
                        fake_quant.unshare(module)
    for one in (model, alone):
        one(TOKENS, labels=TOKENS).loss.backward()
    assert calls == {"shared": 2 * 4, "alone": 2 * 7}  # q/k/v, o, gate/up and down
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert all(fake_quant._last is None for _, fake_quant in fake_quantizers(model))
    strip_qat(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_static_inputs_have_a_scale_for_each_layer_unless_one_is_asked_for() -> None:
    spec = QuantSpec(8, symmetric=False, strategy="tensor", observer="lsq")
    for share, count in ((False, 14), (True, 8)):
        model = llama()
        prepare_qat(model, W4, spec, exclude=["lm_head"], share_inputs=share)
        calibrate(model, [TOKENS])
        assert sum(fq.role == "activation" for _, fq in fake_quantizers(model)) == count
        model(TOKENS, labels=TOKENS).loss.backward()


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(8, type=kind, strategy=strategy) for kind in ("int", "float") for strategy in ("tensor", "token")],
    ids=str,
)
def test_keys_and_values_are_rounded_in_training_and_with_a_cache_alike(spec: QuantSpec) -> None:
    model = llama()
    plain = model(TOKENS).logits
    names = prepare_qat(model, kv_cache=spec)
    assert names == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    calibrate(model, [TOKENS])
    with torch.no_grad():
        whole = model(TOKENS).logits
        cache = model(TOKENS[:, :8], use_cache=True)
        rest = model(TOKENS[:, 8:], past_key_values=cache.past_key_values, use_cache=True).logits
    assert not torch.equal(whole, plain)
    torch.testing.assert_close(whole, plain, rtol=0, atol=0.05)
    torch.testing.assert_close(rest, whole[:, 8:], rtol=1e-5, atol=1e-5)
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    strip_qat(model.eval())
    assert torch.equal(model(TOKENS).logits, plain)


def test_a_rounded_key_is_the_key_after_its_rotary_position() -> None:
    model = llama()
    spec = QuantSpec(2, strategy="token")
    prepare_qat(model, kv_cache=spec)
    attention: Any = model.model.layers[0].self_attn
    seen = []
    attention.key_fake_quant.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    model(TOKENS)
    key, out = seen[0]
    assert key.shape == (2, 2, 12, 8)
    assert torch.equal(out, fake_quantize(key, *computed_qparams(key, spec), spec))


def test_a_model_without_attention_and_an_attention_that_cannot_be_wrapped_are_refused() -> None:
    with pytest.raises(QatkitError, match="kv_cache: Sequential has no attention module of transformers"):
        prepare_qat(nn.Sequential(nn.Linear(2, 2)), kv_cache=TOKEN)
    with pytest.raises(QatkitError, match="computes attention with 'eager', which cannot be wrapped; load the model"):
        prepare_qat(llama(attn_implementation="eager"), kv_cache=TOKEN)
    with pytest.raises(QatkitError, match=r"kv_cache\.strategy: 'channel' is not for caches; write tensor or token"):
        prepare_qat(llama(), kv_cache=W4)


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
    with pytest.raises(QatkitError, match=r"every expert is scaled on its own, so strategy 'tensor'"):
        prepare_qat(mixtral(), QuantSpec(4, strategy="tensor"), include=["*.experts"])


@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_layers_whose_class_is_made_on_the_fly_can_be_pickled(make: Callable[[], Model]) -> None:
    model = make()
    prepare_qat(model, W4, exclude=["lm_head"])
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert strip_qat(again) == strip_qat(model)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.a(x)
        x += self.b(x)
        return x


def test_a_shared_input_that_changes_in_place_is_rounded_again_in_inference_mode_too() -> None:
    model = Pair()
    prepare_qat(model, W4, TOKEN)
    x = torch.randn(4, 8)
    with torch.no_grad():
        expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


def test_a_shared_input_that_was_rounded_without_gradients_does_not_cut_them_and_nothing_is_kept_outside() -> None:
    model = Pair()
    prepare_qat(model, W4, TOKEN)
    x = torch.randn(4, 8, requires_grad=True)
    with torch.no_grad():
        model.a(x)
    model.b(x).sum().backward()
    assert x.grad is not None
    (shared,) = {fq for _, fq in fake_quantizers(model) if fq.role == "activation"}
    assert shared._last is None


def test_an_attention_that_asks_for_the_name_of_its_function_is_refused() -> None:
    config = transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(QatkitError, match="is a FalconAttention, whose code asks for the attention's name"):
        prepare_qat(transformers.FalconForCausalLM(config), kv_cache=TOKEN)


def test_attention_modules_can_be_excluded_and_patterns_beside_a_cache_alone_are_checked() -> None:
    assert prepare_qat(llama(), kv_cache=TOKEN, exclude=["*.0.*"]) == ["model.layers.1.self_attn"]
    with pytest.raises(QatkitError, match=r"exclude\[0\]: 'layr' matches no layer"):
        prepare_qat(llama(), kv_cache=TOKEN, exclude=["layr"])
    with pytest.raises(QatkitError, match=r"include: .* has no meaning with kv_cache alone"):
        prepare_qat(llama(), kv_cache=TOKEN, include=["nonsense"])


def test_quantizers_that_were_never_calibrated_are_refused_on_loading(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    fresh = copy.deepcopy(model)
    prepare_qat(model, W4, QuantSpec(8, strategy="tensor"))
    save_quantizers(model, tmp_path / "q.safetensors")
    with pytest.raises(QatkitError, match="layer '0' has no scale for its input; it was saved before it was"):
        load_quantizers(fresh, tmp_path / "q.safetensors")


def test_a_static_cache_waits_for_calibration_while_gptq_runs() -> None:
    model = llama()
    prepare_qat(model, QuantSpec(4, observer="mse"), exclude=["lm_head"], kv_cache=QuantSpec(8, strategy="tensor"))
    initialise(model, "gptq", [TOKENS])
    calibrate(model, [TOKENS])
    assert model(TOKENS).logits.isfinite().all()


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


def test_a_cache_is_verified_as_inputs_are_and_refused_by_onnx(tmp_path: Any) -> None:
    model = llama()
    prepare_qat(model, kv_cache=QuantSpec(8, strategy="tensor"))
    calibrate(model, [TOKENS])
    export_dense(model, tmp_path / "model.safetensors")
    checked = verify(model, tmp_path / "model.safetensors", [{"input_ids": TOKENS, "labels": TOKENS}])
    assert checked.quantization_error is not None
    assert checked.quantization_error > 0
    with pytest.raises(QatkitError, match="quantized keys and values cannot be written to ONNX"):
        export_onnx(model, TOKENS, tmp_path / "model.onnx")
    model = mixtral()
    prepare_qat(model, W4, include=["*.experts"])
    with pytest.raises(QatkitError, match="fused experts cannot be written to ONNX"):
        export_onnx(model, TOKENS, tmp_path / "model.onnx")
