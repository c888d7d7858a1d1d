"""compressed-tensors folders: plain transformers loads them and computes exactly what training computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from qatkit import QatkitError, QatkitWarning, QuantSpec, calibrate, prepare_qat, scheme
from qatkit.export.compressed.format import export_compressed
from qatkit.export.formats import FORMATS
from qatkit.export.verification import verify
from qatkit.models import cnn, llama, untrained_model
from qatkit.quantization.prepare import qat_layers
from qatkit.schemes import Scheme

TOKENS = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


def model_with(
    quantize: Mapping[str, Scheme] | Scheme, dtype: torch.dtype = torch.float32, steps: int = 3, **shape: Any
) -> nn.Module:
    """A small Llama, trained for a few steps, with learned scales where the scheme has them."""
    torch.manual_seed(0)
    given = {"hidden": 128, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 128, "context": 32}
    model = llama(300, **{**given, "tie_embeddings": False, **shape})
    if dtype != torch.float32:
        model = type(model)._from_config(model.config, dtype=dtype)  # `.to` would round the rotary frequencies too
    if isinstance(quantize, Scheme):
        prepare_qat(model, quantize.weight, quantize.activation, exclude=["lm_head"])
    else:
        prepare_qat(model, layers=quantize)
    calibrate(model, [BATCH], lambda batch: model(batch["input_ids"]))
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


def specs(name: str, size: int | None = None, observer: str | None = None) -> Scheme:
    found = scheme(name)
    weight = found.weight
    assert weight is not None
    changes: dict[str, Any] = {"observer": observer} if observer else {}
    fields = {**weight.__dict__, **({"group_size": size} if size else {}), **changes}
    return Scheme(QuantSpec(**fields), found.activation)


@pytest.mark.parametrize(
    ("quantize", "form"),
    [
        (specs("W4A16", observer="lsq"), "pack-quantized"),
        (specs("W4A16", size=32, observer="mse"), "pack-quantized"),
        (specs("W8A16", size=64), "pack-quantized"),
        (specs("W2A16", size=16, observer="lsq"), "pack-quantized"),
        (Scheme(QuantSpec(4, strategy="channel", observer="lsq", scale_dtype="bfloat16")), "pack-quantized"),
        (specs("Q8_0"), "pack-quantized"),
        (specs("W8A8", observer="lsq"), "int-quantized"),
        (Scheme(QuantSpec(8), QuantSpec(8, strategy="tensor", observer="lsq")), "int-quantized"),
        (specs("W4A8", size=32), "int-quantized"),
        (specs("FP8"), "float-quantized"),
        (specs("FP8_DYNAMIC", observer="mse"), "float-quantized"),
        (specs("FP8_BLOCK"), "float-quantized"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_plain_transformers_gives_the_trained_logits_to_the_last_bit(
    quantize: Scheme, form: str, tmp_path: Path
) -> None:
    model = model_with(quantize)
    export_compressed(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == form
    assert config["ignore"] == ["lm_head"]
    check = verify(model, tmp_path / "out", [BATCH])
    assert check.passed, check.failures
    assert (check.format, check.layers, check.allowed_error) == ("compressed_tensors", 14, 0.0)
    assert (check.mean_error, check.agreement) == (0.0, 1.0)
    assert check.trained_metric == check.runtime_metric
    assert check.quantization_error > 0


def test_layers_of_several_kinds_are_in_groups_of_their_own_and_the_rest_is_ignored(tmp_path: Path) -> None:
    model = model_with(
        {"*.mlp.*": specs("W4A16", size=32), "*.q_proj": specs("W8A8"), "*.1.mlp.up_proj": Scheme(QuantSpec(8))}
    )
    export_compressed(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    targets = {tuple(group["targets"]) for group in config["config_groups"].values()}
    assert ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj") in targets
    assert ("model.layers.1.mlp.up_proj",) in targets
    plain = {name for name, layer in model.named_modules() if type(layer) is nn.Linear}
    assert (
        set(config["ignore"])
        == plain
        == {"lm_head"} | {f"model.layers.{index}.self_attn.{name}_proj" for index in (0, 1) for name in "kvo"}
    )
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    assert verify(model, tmp_path, [BATCH]).passed


@pytest.mark.parametrize("name", ["W4A16", "FP8_DYNAMIC"])
def test_bfloat16_models_keep_their_codes(name: str, tmp_path: Path) -> None:
    found = scheme(name)
    assert found.weight is not None
    weight = QuantSpec(**{**found.weight.__dict__, "scale_dtype": "bfloat16"})
    model = model_with(Scheme(weight), dtype=torch.bfloat16, steps=0)
    export_compressed(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))
    assert verify(model, tmp_path, [BATCH]).passed


def test_the_zeros_of_a_held_2_to_4_mask_are_code_zero_in_the_file(tmp_path: Path) -> None:
    from qatkit.pruning.masks import nm_mask

    model = model_with(specs("W4A16", size=32, observer="lsq"), steps=0)
    masks = {}
    for name, layer in qat_layers(model):
        masks[name] = nm_mask(layer.weight.detach(), 2, 4)
        layer.weight.data *= masks[name]
    export_compressed(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, mask in masks.items():
        codes = unpack_from_int32(tensors[f"{name}.weight_packed"], 4, mask.shape)
        assert (codes[mask == 0] == 0).all()
        assert ((codes.view(-1, 4) != 0).sum(1) <= 2).all()
        assert (codes[mask != 0] != 0).float().mean() > 0.5, "the mask must not be all there is"


def test_a_changed_code_a_changed_scale_and_a_changed_norm_are_found_by_name(tmp_path: Path) -> None:
    model = model_with(specs("W4A16", size=32))
    export_compressed(model, tmp_path)
    original = load_file(tmp_path / "model.safetensors")
    cases = {
        "model.layers.0.mlp.up_proj.weight_packed": "'model.layers.0.mlp.up_proj.weight': 1 of 16384 codes differ",
        "model.layers.1.mlp.up_proj.weight_scale": "'model.layers.1.mlp.up_proj.weight_scale': 1 of 512 scales differ",
        "model.norm.weight": "'model.norm.weight': 1 of 128 values differ, the first at [0]",
    }
    for key, message in cases.items():
        tensors = {name: tensor.clone() for name, tensor in original.items()}
        flat = tensors[key].view(-1)
        flat[0] = flat[0] ^ 1 if flat.dtype == torch.int32 else flat[0] * 1.01
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        check = verify(model, tmp_path, [BATCH])
        assert not check.passed
        assert check.failures[0].startswith(message), check.failures
        assert any(failure.startswith("outputs: ") for failure in check.failures)
    (tmp_path / "model.safetensors").write_bytes(b"")
    check = verify(model, tmp_path, [BATCH])
    assert check.failures[0].startswith("model.safetensors cannot be read: ")
    assert check.runtime_metric is None


def test_int4_is_an_eighth_and_int8_a_quarter_of_the_linear_weights(tmp_path: Path) -> None:
    for name, bits in (("W4A16", 4), ("W8A8", 8)):
        model = model_with(specs(name), steps=0)
        export_compressed(model, tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        codes = [t for key, t in tensors.items() if key.endswith(("weight_packed", "_proj.weight"))]
        assert sum(t.numel() * t.element_size() for t in codes) * 8 == bits * sum(
            layer.weight.numel() for _, layer in qat_layers(model)
        )


def test_a_model_without_quantization_is_a_plain_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama(300, 32, 1, 2, 1, 48, 16).eval()
    export_compressed(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    check = verify(model, tmp_path, [BATCH])
    assert check.passed, check.failures
    assert (check.layers, check.mean_error) == (0, 0.0)


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        (Scheme(QuantSpec(2, type="ternary", observer="absmean")), r"ternary codes; set weight: \{num_bits: 2\}"),
        (specs("Q4_0"), r"GGUF format \(Q4_0\), which has negative scales; set scheme: W4A16"),
        (specs("W4A16_ASYM"), r"zero points .*; set weight: \{symmetric: true\}"),
        (specs("W3A16"), r"pack 3-bit codes differently; set weight: \{num_bits: 4\}"),
        (specs("NVFP4A16"), r"to bfloat16, but the model is in float32; use a bfloat16 model"),
        (specs("MXFP8A16"), r"to bfloat16, but the model is in float32; use a bfloat16 model"),
        (Scheme(QuantSpec(8), QuantSpec(8, strategy="token")), r"127\.5.*set scheme: W8A8"),
        (Scheme(QuantSpec(8), QuantSpec(8, symmetric=False, strategy="tensor")), r"activation: \{symmetric: true\}"),
        (Scheme(None, QuantSpec(8, strategy="token")), r"an unquantized weight; quantize the layer's weight too"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_hold_is_refused_with_what_to_write(
    quantize: Scheme, message: str, tmp_path: Path
) -> None:
    with pytest.raises(QatkitError, match=rf"layer 'model\.layers\.0\.self_attn\.q_proj': .*{message}"):
        export_compressed(model_with(quantize, steps=0), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_layers_that_are_not_linear_tied_weights_and_other_models_are_refused(tmp_path: Path) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16))
    prepare_qat(gpt2, QuantSpec(4), exclude=["lm_head"])
    with pytest.raises(
        QatkitError, match=r"layer 'transformer\.h\.0\.attn\.c_attn': .*this is a QATConv1D; exclude the layer"
    ):
        export_compressed(gpt2, tmp_path / "out")
    tied = llama(300, 32, 1, 2, 1, 48, 16)
    prepare_qat(tied, QuantSpec(4))
    with pytest.raises(QatkitError, match=r"layer 'lm_head': the weight is tied to 'model\.embed_tokens'"):
        export_compressed(tied, tmp_path / "out")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "num_local_experts": 2}
    mixtral = MixtralForCausalLM(MixtralConfig(vocab_size=64, **shape))
    experts = r"layer 'model\.layers\.0\.mlp\.experts': .*fused experts.*use export: \{format: dense\}"
    for layers in (["*self_attn*"], ["*"]):  # transformers cannot load them beside compressed layers either
        prepare_qat(mixtral, QuantSpec(4), include=layers, exclude=["lm_head"])
        with pytest.raises(QatkitError, match=experts):
            export_compressed(mixtral, tmp_path / "out")
        mixtral = MixtralForCausalLM(mixtral.config)
    with pytest.raises(QatkitError, match=r"'compressed_tensors' is supported only for transformers models"):
        export_compressed(cnn(), tmp_path / "out")
    half = model_with(specs("W4A16"), dtype=torch.bfloat16, steps=0)
    with pytest.raises(QatkitError, match=r"loaded in bfloat16.*set weight: \{scale_dtype: bfloat16\}"):
        export_compressed(half, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "head", "layer"),
    [
        ("bert", "SequenceClassification", "bert.pooler.dense"),
        ("roberta", "SequenceClassification", "classifier.dense"),
        ("deberta-v2", "SequenceClassification", "classifier"),
        ("bert", "TokenClassification", None),
    ],
)
def test_a_layer_whose_input_has_no_token_dimension_is_refused_before_training(
    family: str, head: str, layer: str | None
) -> None:
    """compressed-tensors computes one scale for a whole input of two dimensions; qatkit computes one per row."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = untrained_model(family, head, {**shape, "vocab_size": 100})
    layers = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    form = FORMATS["compressed_tensors"]
    if layer is not None:
        with pytest.raises(QatkitError, match=f"layer '{layer}': its input has no token dimension"):
            form.check_model(model, dict.fromkeys(layers, scheme("W8A8")))
        form.check_model(model, dict.fromkeys(layers, scheme("W8A16")))
        layers = [name for name in layers if not name.startswith(("bert.pooler", "pooler", "classifier"))]
    form.check_model(model, dict.fromkeys(layers, scheme("W8A8")))


def test_a_vision_model_is_traced_and_one_that_cannot_be_traced_is_named() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    form, planned = FORMATS["compressed_tensors"], {"classifier": scheme("W8A8")}
    vision = untrained_model("vit", "ImageClassification", {**shape, "image_size": 32})
    with pytest.raises(QatkitError, match="layer 'classifier': its input has no token dimension"):
        form.check_model(vision, planned)
    without_weights = untrained_model("deberta-v2", "SequenceClassification", {**shape, "vocab_size": 100}).to("meta")
    with pytest.warns(QatkitWarning, match="the inputs of DebertaV2ForSequenceClassification cannot be traced"):
        form.check_model(without_weights, planned)
