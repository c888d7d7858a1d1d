"""GGUF files: the gguf package decodes the trained weights, and transformers computes the trained logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qatkit import QatkitError, QuantSpec, prepare_qat, scheme
from qatkit.export.formats import FORMATS
from qatkit.export.gguf.format import export_gguf
from qatkit.export.verification import verify
from qatkit.models import cnn, llama
from qatkit.pipeline.validation import validate_recipe
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.prepare import quantized_weights
from qatkit.recipe.loading import load_recipe

TOKENS = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


def spec(name: str, **changes: Any) -> QuantSpec:
    found = scheme(name).weight
    assert found is not None
    return QuantSpec(**{**found.__dict__, **changes})


def trained(weight: QuantSpec | None, steps: int = 2, **shape: Any) -> nn.Module:
    """A small Llama, trained for a few steps so that norms and scales are not the initial ones."""
    torch.manual_seed(0)
    given = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 96, "context": 32}
    model = llama(300, **{**given, "tie_embeddings": False, **shape})
    if weight is not None:
        prepare_qat(model, weight, exclude=["lm_head"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


def loaded(path: Path) -> nn.Module:
    """The model that transformers makes from the file alone, in float32."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (spec("Q8_0"), "Q8_0"),
        (spec("Q4_0", observer="lsq"), "Q4_0"),
        (spec("Q4_0", scale_rule="qmax", observer="mse"), "Q4_0"),
        (spec("Q5_0", observer="lsq"), "Q5_0"),
        (spec("Q4_1", observer="lsq_plus"), "Q4_1"),
        (spec("Q5_1", observer="mse"), "Q5_1"),
        (spec("MXFP4A16"), "MXFP4"),
        (spec("Q4_K"), "Q4_K"),
        (spec("Q4_K", observer="lsq_plus"), "Q4_K"),
        (spec("Q3_K", observer="lsq"), "Q3_K"),
        (spec("NVFP4_UE4M3", observer="lsq"), "NVFP4"),
        (spec("TQ1_0", observer="lsq"), "TQ1_0"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.observer}-{value.scale_rule}",
)
def test_transformers_computes_the_trained_logits_from_the_file_alone(
    weight: QuantSpec, kind: str, tmp_path: Path
) -> None:
    shape = {"hidden": 256, "intermediate": 256} if weight.super_blocks or kind in ("TQ1_0", "NVFP4") else {}
    model, path = trained(weight, **shape), tmp_path / "model.gguf"
    export_gguf(model, path)
    assert torch.equal(logits(loaded(path)), logits(model))
    types = {tensor.tensor_type.name for name, tensor in tensors(path).items() if "ffn" in name and "norm" not in name}
    assert types == {kind}
    check = verify(model, path, [BATCH])
    assert check.passed, check.failures
    assert (check.format, check.layers, check.allowed_error, check.mean_error) == ("gguf", 14, 0.0, 0.0)
    assert check.quantization_error > 0


def test_the_gguf_package_decodes_the_trained_weights_and_the_zeros_of_pruned_ones(tmp_path: Path) -> None:
    model, path = trained(spec("Q4_0")), tmp_path / "model.gguf"
    for _, weight, _ in quantized_weights(model):
        weight.data[:, ::2] = 0
    export_gguf(model, path)
    found = tensors(path)["blk.1.ffn_down.weight"]
    values = dequantize(found.data, found.tensor_type)
    expected = model.get_submodule("model.layers.1.mlp.down_proj").fake_quantized_weight()
    assert np.array_equal(values, expected.detach().numpy())
    assert (values[:, ::2] == 0).all()
    assert (values[:, 1::2] != 0).mean() > 0.5


def test_every_layer_has_its_own_type_and_embeddings_and_the_output_layer_have_one_too(tmp_path: Path) -> None:
    layers = {
        "model.embed_tokens": scheme("Q2_K"),
        "lm_head": scheme("Q6_K"),
        "*_proj": scheme("Q4_0"),
        "*.1.mlp.up_proj": scheme("MXFP4A16"),
        "*.down_proj": scheme("TQ2_0"),
        "*.o_proj": scheme("Q5_K"),
    }
    torch.manual_seed(0)
    model, path = llama(300, 256, 2, 4, 2, 256, 32, tie_embeddings=False).eval(), tmp_path / "model.gguf"
    prepare_qat(model, layers=layers)
    export_gguf(model, path)
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(path).items()}
    assert (kinds["token_embd.weight"], kinds["output.weight"], kinds["output_norm.weight"]) == ("Q2_K", "Q6_K", "F32")
    assert (kinds["blk.0.ffn_up.weight"], kinds["blk.1.ffn_up.weight"]) == ("Q4_0", "MXFP4")
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.attn_k.weight"]) == ("TQ2_0", "Q4_0")
    assert kinds["blk.1.attn_output.weight"] == "Q5_K"
    assert torch.equal(logits(loaded(path)), logits(model))
    assert verify(model, path, [BATCH]).passed


def test_tied_embeddings_are_quantized_together_or_not_at_all(tmp_path: Path) -> None:
    model, path = llama(300, 64, 1, 4, 2, 96, 32).eval(), tmp_path / "model.gguf"
    both = {"model.embed_tokens": scheme("Q8_0"), "lm_head": scheme("Q8_0")}
    prepare_qat(model, layers=both)
    export_gguf(model, path)
    assert tensors(path)["token_embd.weight"].tensor_type.name == "Q8_0"
    assert "output.weight" not in tensors(path)
    assert torch.equal(logits(loaded(path)), logits(model))
    assert verify(model, path, [BATCH]).passed
    model = llama(300, 64, 1, 4, 2, 96, 32)
    prepare_qat(model, layers={"lm_head": scheme("Q8_0")})
    with pytest.raises(QatkitError, match="share one tied weight but quantize it differently"):
        export_gguf(model, path)


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    model, path = trained(spec("Q8_0"), tie_embeddings=True), tmp_path / "model.gguf"
    export_gguf(model, path)
    assert "output.weight" not in tensors(path)
    assert torch.equal(logits(loaded(path)), logits(model))
    assert verify(model, path, [BATCH]).passed


def test_separate_output_weights_are_stored_although_the_config_says_tied(tmp_path: Path) -> None:
    model, path = trained(spec("Q8_0")), tmp_path / "model.gguf"
    model.config.tie_word_embeddings = True
    export_gguf(model, path)
    assert "output.weight" in tensors(path)
    assert torch.equal(logits(loaded(path)), logits(model))
    check = verify(model, path, [BATCH])
    assert check.passed, check.failures


def test_a_model_without_quantization_is_stored_without_loss(tmp_path: Path) -> None:
    model, path = trained(None), tmp_path / "model.gguf"
    export_gguf(model, path)
    assert {tensor.tensor_type.name for tensor in tensors(path).values()} == {"F32"}
    assert torch.equal(logits(loaded(path)), logits(model))
    assert verify(model, path, [BATCH]).passed


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_matrices_whose_values_fit_are_stored_in_half_precision(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    model, path = trained(spec("Q8_0")), tmp_path / "model.gguf"
    embedding = model.get_submodule("model.embed_tokens").weight
    embedding.data = embedding.to(dtype).float()
    export_gguf(model, path)
    assert tensors(path)["token_embd.weight"].tensor_type.name == kind
    assert tensors(path)["output.weight"].tensor_type.name == "F32"
    assert torch.equal(logits(loaded(path)), logits(model))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            spec("W4A16"),
            r"no GGUF type stores weights with group_size: 128, scale_dtype: float32; set scheme: Q4_0, or weight: "
            r"\{group_size: 32, scale_dtype: float16\} \(Q4_0\), or use export: \{format: dense\}",
        ),
        (
            QuantSpec(8),
            r".*with strategy: channel, scale_dtype: float32; set scheme: Q8_0, or weight: "
            r"\{strategy: group, group_size: 32, scale_dtype: float16\}",
        ),
        (spec("Q4_0", num_bits=3), r".*with num_bits: 3; set scheme: Q4_0, or weight: \{num_bits: 4\}"),
        (
            spec("W4A16_ASYM", group_size=32),
            r".*with scale_dtype: float32, scale_rule: qmax; set scheme: Q4_1, or weight: "
            r"\{scale_dtype: float16, scale_rule: minimum\} \(Q4_1\)",
        ),
        (spec("NVFP4A16"), r".*; set scheme: MXFP4A16, or weight: \{group_size: 32, scale_dtype: float8_e8m0fnu\}"),
        (
            spec("Q2_K", group_size=32),
            r".*with group_size: 32; set scheme: Q2_K, or weight: \{group_size: 16\} \(Q2_K\)",
        ),
        (spec("Q8_0", symmetric=False), r".*with symmetric: false; set scheme: Q8_0, or weight: \{symmetric: true\}"),
    ],
    ids=["group 128", "channel", "3 bits", "zero points", "NVFP4", "K-quant", "8-bit zero points"],
)
def test_a_scheme_that_no_type_stores_is_refused_with_the_keys_that_fit(weight: QuantSpec, message: str) -> None:
    hidden = 256 if weight.super_blocks else 128
    model = llama(300, hidden, 1, 2, 1, hidden, 32)
    prepare_qat(model, weight, exclude=["lm_head"])
    with pytest.raises(QatkitError, match=rf"layer 'model\.layers\.0\.self_attn\.q_proj': {message}"):
        FORMATS["gguf"].check_model(model)


def test_quantized_activations_and_other_models_are_refused() -> None:
    model = llama(300, 64, 1, 2, 1, 96, 32)
    prepare_qat(model, spec("Q8_0"), scheme("W8A8").activation, exclude=["lm_head"])
    message = r"llama\.cpp quantizes the inputs of Q8_0 weights itself, .* groups of 32, .*set scheme: \w+_A8"
    with pytest.raises(QatkitError, match=message):
        FORMATS["gguf"].check_model(model)
    model = llama(300, 64, 1, 2, 1, 96, 32)
    prepare_qat(model, None, scheme("Q8_0_A8").activation, exclude=["lm_head"])
    with pytest.raises(QatkitError, match=r"llama\.cpp quantizes only the inputs of layers with quantized weights"):
        FORMATS["gguf"].check_model(model)
    with pytest.raises(
        QatkitError, match=r"'gguf' is supported only for transformers models, but the model is a Chain"
    ):
        FORMATS["gguf"].check_model(cnn())
    model = llama(300, 64, 1, 2, 1, 96, 32)
    model.config.hidden_act = "gelu"
    with pytest.raises(QatkitError, match=r"implements 'llama' only with hidden_act: 'silu', but the model has 'gelu'"):
        FORMATS["gguf"].check_model(model)


def test_inputs_are_quantized_as_the_gguf_package_and_llama_cpp_do(tmp_path: Path) -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 64)[:, None]
    x[0, :32] = 0
    found = FakeQuantize(scheme("Q4_0_A8").activation, "activation", (1,))(x)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    assert np.array_equal(found.numpy(), dequantize(quantize(x.numpy(), q8_0), q8_0))
    blocks = x.double().view(-1, 256)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    codes = (blocks * (-127 / largest)).round()
    found = FakeQuantize(scheme("Q4_K_A8").activation, "activation", (1,))(x)
    assert torch.allclose(found.double().view(-1, 256), codes * largest / -127, rtol=1e-6, atol=0)
    model, path = llama(300, 64, 1, 2, 1, 96, 32, tie_embeddings=False).eval(), tmp_path / "model.gguf"
    prepare_qat(model, scheme("Q4_0_A8").weight, scheme("Q4_0_A8").activation, exclude=["lm_head"])
    export_gguf(model, path)
    check = verify(model, path, [BATCH])
    assert check.passed, check.failures
    assert check.bound == "none, since transformers does not quantize activations"
    assert check.mean_error is not None
    assert check.mean_error > 0


def test_the_limits_are_checked_before_training() -> None:
    with pytest.raises(QatkitError, match=r"export\.format: stage 'ptq': layer '.*q_proj': no GGUF type.*Q4_0"):
        validate_recipe(load_recipe("llm/int4_qat", ["export.format=gguf"]))
