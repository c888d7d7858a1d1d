"""Keys and values that are rounded as the cache holds them, and inputs that several layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from qatkit import (
    QatkitError,
    QuantSpec,
    apply_ptq,
    calibrate,
    fake_quantize,
    prepare_qat,
    strip_qat,
)
from qatkit.export.dense import export_dense
from qatkit.export.onnx.format import export_onnx
from qatkit.export.verification import verify
from qatkit.quantization.estimators import computed_qparams
from qatkit.quantization.prepare import fake_quantizers
from tests.quantization.families import TOKEN, TOKENS, W4, llama, mixtral


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.a(x)
        x += self.b(x)
        return x


def test_a_dynamic_input_is_quantized_once_for_all_layers_that_read_it_and_let_go_of() -> None:
    model = llama()
    prepare_qat(model, W4, TOKEN, exclude=["lm_head"])
    alone = llama()
    prepare_qat(alone, W4, TOKEN, exclude=["lm_head"])
    calls = {"shared": 0, "alone": 0}

    def count(key: str) -> Callable[..., Any]:
        def counted(self: Any, *arguments: Any) -> Any:
            calls[key] += 1
            return type(self)._fake_quantized(self, *arguments)

        return counted

    for key, one in (("shared", model), ("alone", alone)):
        for _, fake_quant in fake_quantizers(one):
            if fake_quant.role == "activation":
                fake_quant._fake_quantized = count(key).__get__(fake_quant)  # type: ignore[method-assign]
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
    with pytest.raises(QatkitError, match="kv_cache: Sequential has no transformers attention module"):
        prepare_qat(nn.Sequential(nn.Linear(2, 2)), kv_cache=TOKEN)
    with pytest.raises(
        QatkitError, match="computes attention with 'eager', which qatkit does not support; load the model"
    ):
        prepare_qat(llama(attn_implementation="eager"), kv_cache=TOKEN)
    with pytest.raises(
        QatkitError, match=r"kv_cache\.strategy: 'channel' is not supported for the KV cache; use tensor or token"
    ):
        prepare_qat(llama(), kv_cache=W4)


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
    with pytest.raises(
        QatkitError, match="is a FalconAttention, whose code depends on the name of the attention function"
    ):
        prepare_qat(transformers.FalconForCausalLM(config), kv_cache=TOKEN)


def test_attention_modules_can_be_excluded_and_patterns_beside_a_cache_alone_are_checked() -> None:
    assert prepare_qat(llama(), kv_cache=TOKEN, exclude=["*.0.*"]) == ["model.layers.1.self_attn"]
    with pytest.raises(QatkitError, match=r"exclude\[0\]: 'layr' matches no layer"):
        prepare_qat(llama(), kv_cache=TOKEN, exclude=["layr"])
    with pytest.raises(QatkitError, match=r"include: .* has no effect if only kv_cache is quantized"):
        prepare_qat(llama(), kv_cache=TOKEN, include=["nonsense"])


def test_a_static_cache_waits_for_calibration_while_gptq_runs() -> None:
    model = llama()
    prepare_qat(model, QuantSpec(4, observer="mse"), exclude=["lm_head"], kv_cache=QuantSpec(8, strategy="tensor"))
    apply_ptq(model, "gptq", [TOKENS])
    calibrate(model, [TOKENS])
    assert model(TOKENS).logits.isfinite().all()


def test_a_cache_is_verified_as_inputs_are_and_refused_by_onnx(tmp_path: Any) -> None:
    model = llama()
    prepare_qat(model, kv_cache=QuantSpec(8, strategy="tensor"))
    calibrate(model, [TOKENS])
    export_dense(model, tmp_path / "model.safetensors")
    checked = verify(model, tmp_path / "model.safetensors", [{"input_ids": TOKENS, "labels": TOKENS}])
    assert checked.quantization_error is not None
    assert checked.quantization_error > 0
    with pytest.raises(QatkitError, match="ONNX export does not support KV cache quantization"):
        export_onnx(model, TOKENS, tmp_path / "model.onnx")
    model = mixtral()
    prepare_qat(model, W4, include=["*.experts"])
    with pytest.raises(QatkitError, match="ONNX export does not support quantized fused experts"):
        export_onnx(model, TOKENS, tmp_path / "model.onnx")
