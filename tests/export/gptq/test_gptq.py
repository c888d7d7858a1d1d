"""Folders in the layouts of GPTQ and AWQ hold the trained codes and scales, which gptqmodel decodes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from qatkit import QatkitError, QuantSpec, export_model, prepare_qat
from qatkit.export.formats import FORMATS, format_of_path
from qatkit.export.gptq.format import export_packed
from qatkit.export.verification import verify
from qatkit.models import llama
from qatkit.schemes import Scheme

PYTHON = os.environ.get("QATKIT_GPTQ")
needs_gptqmodel = pytest.mark.skipif(PYTHON is None, reason="QATKIT_GPTQ is not the interpreter of an environment")
LAYER = "model.layers.1.mlp.down_proj"


def spec(bits: int = 4, symmetric: bool = True, group: int | None = 32, **more: Any) -> QuantSpec:
    return QuantSpec(bits, symmetric, "group" if group else "channel", group, scale_dtype="float16", **more)


def plain(hidden: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return llama(300, hidden, 2, 2, 1, 128).eval()


def small(weight: QuantSpec | None = None, **more: Any) -> nn.Module:
    model = plain()
    prepare_qat(model, weight or spec(), exclude=["lm_head"], **more)
    return model


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids, "labels": ids}]


SPECS = [
    spec(),
    spec(2),
    spec(3),
    spec(8),
    spec(group=None),
    spec(symmetric=False),
    spec(3, False, 16),
    spec(4, False, 64, scale_rule="minimum"),
    spec(scale_rule="signed"),
]


def name_of(value: QuantSpec) -> str:
    group = value.group_size or "channel"
    return f"{value.num_bits}-{'symmetric' if value.symmetric else 'asymmetric'}-{group}-{value.scale_rule}"


@pytest.mark.parametrize("weight", SPECS, ids=name_of)
def test_every_supported_spec_is_stored_exactly(weight: QuantSpec, tmp_path: Path) -> None:
    result = export_model(small(weight), "gptq", tmp_path / "gptq", batches())
    assert result.passed, result.failures
    assert (result.mean_error, result.not_run) == (0.0, "gptqmodel")
    assert format_of_path(tmp_path / "gptq").name == "gptq"
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == ("gptq" if weight.symmetric else "gptq_v2")
    assert config["block_name_to_quantize"] == "model.layers"


def test_words_follow_the_formula_of_the_paper_s_code(tmp_path: Path) -> None:
    """The first release of GPTQ packs codes of 3 bits as 10 codes, two bits and one bit of a code, and so on."""
    model = small(spec(3))
    export_packed(model, tmp_path / "gptq", "gptq")
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    layer: Any = model.get_submodule(LAYER)
    scale, _ = layer.weight_fake_quant.qparams(layer.matrix)
    codes = (layer.fake_quantized_weight()[0] / scale[0].repeat_interleave(32)).round().long() + 4
    first, second = (int(word) & 0xFFFFFFFF for word in tensors[f"{LAYER}.qweight"][:2, 0])
    assert first == sum(int(code) << (3 * place) for place, code in enumerate(codes[:10])) + (
        (int(codes[10]) & 3) << 30
    )
    assert second & 1 == int(codes[10]) >> 2
    assert tensors[f"{LAYER}.qzeros"][0, 0] & 7 == 3  # the zero point 4, minus 1
    assert tensors[f"{LAYER}.g_idx"].tolist() == [place // 32 for place in range(128)]


def test_a_model_that_is_not_quantized_is_a_plain_folder(tmp_path: Path) -> None:
    result = export_model(plain(), "gptq", tmp_path / "gptq", batches())
    assert result.passed, result.failures
    assert "quantization_config" not in json.loads((tmp_path / "gptq" / "config.json").read_text())


def bias_of(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def qwen() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=300, intermediate_size=128, tie_word_embeddings=False, **shape)
    return bias_of(AutoModelForCausalLM.from_config(config).eval())


def test_biases_and_layers_that_are_excluded_in_every_block(tmp_path: Path) -> None:
    model = qwen()
    prepare_qat(model, spec(), exclude=["lm_head", "*down_proj"])
    result = export_model(model, "gptq", tmp_path / "gptq", batches())
    assert result.passed, result.failures
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert ["mlp.down_proj"] not in config["modules_in_block_to_quantize"]


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_one_changed_value_is_found_and_named(part: str, tmp_path: Path) -> None:
    model, file = small(), tmp_path / "gptq" / "model.safetensors"
    export_packed(model, tmp_path / "gptq", "gptq")
    tensors = load_file(file)
    changed = tensors[f"{LAYER}.{part}"].view(torch.int16 if part == "scales" else torch.int32)
    changed[(1,) * changed.dim()] += 1  # one code, one zero point, one ulp, or one group
    save_file(tensors, file)
    result = verify(model, tmp_path / "gptq", batches())
    assert not result.passed
    assert f"'{LAYER}.{part}': 1 of" in result.failures[0]


def test_swapped_rows_missing_and_unknown_tensors_and_a_changed_config_are_found(tmp_path: Path) -> None:
    model, folder = small(), tmp_path / "gptq"
    export_packed(model, folder, "gptq")
    tensors = load_file(folder / "model.safetensors")
    words = tensors[f"{LAYER}.qweight"]
    swapped = words[:, [1, 0, *range(2, 64)]].contiguous()
    save_file(tensors | {f"{LAYER}.qweight": swapped}, folder / "model.safetensors")
    assert f"'{LAYER}.qweight'" in verify(model, folder, batches()).failures[0]
    norm = "model.norm.weight"
    damaged = tensors | {"more": torch.ones(1), norm: tensors[norm] + 1}
    del damaged[f"{LAYER}.qzeros"]
    save_file(damaged, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (folder / "config.json").write_text(json.dumps(config))
    failures = verify(model, folder, batches()).failures
    assert [failure.split("'")[1] for failure in failures] == ["checkpoint_format", f"{LAYER}.qzeros", norm, "more"]
    (folder / "config.json").write_text("{")
    assert "gptq cannot be read" in verify(model, folder, batches(), "gptq").failures[0]


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            QuantSpec(4, strategy="group", group_size=32),
            "does not support scale_dtype: float32; set weight: {scale_dtyp",
        ),
        (spec(5), "does not support num_bits: 5; set weight: {num_bits: 2 or 3 or 4 or 8}"),
        (spec(group=8), "does not support group_size: 8; set weight: {group_size: 16 or 32"),
        (QuantSpec(4, strategy="tensor", scale_dtype="float16"), "does not support strategy: tensor"),
        (
            QuantSpec(2, type="ternary", observer="absmean", scale_dtype="float16"),
            "does not support type: ternary; set weight: {type: int}",
        ),
    ],
)
def test_what_the_layout_cannot_hold_is_refused_with_the_fix(weight: QuantSpec, message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        FORMATS["gptq"].check_model(small(weight))


def test_models_and_layers_that_readers_do_not_support_are_refused_by_name() -> None:
    def refused(model: nn.Module, message: str) -> None:
        with pytest.raises(QatkitError, match=message):
            FORMATS["gptq"].check_model(model)

    refused(nn.Linear(4, 4), "'gptq' is supported only for transformers language models, but the model is a Linear")
    refused(small().to(torch.bfloat16), "the weight is bfloat16, to which training rounds the dequantized weights")
    refused(small(activation=QuantSpec(8, strategy="token")), "and inputs that are not quantized; remove activation")
    model = qwen()
    prepare_qat(model, spec())
    refused(model, "layer 'lm_head': readers of 'gptq' expect an output layer that is not quantized")
    model = plain()
    prepare_qat(model, spec(), include=["*", "model.embed_tokens"], exclude=["lm_head"])
    refused(model, "supports only linear layers, but this is a QATEmbedding")
    model = plain()
    prepare_qat(model, spec(), exclude=["lm_head", LAYER])
    refused(model, f"layer '{LAYER}': readers of 'gptq' expect the same quantized layers in every block")
    model = plain()
    prepare_qat(model, layers={"*up_proj": Scheme(spec()), "*down_proj": Scheme(spec(8))})
    refused(model, "layers 'model.layers.0.mlp.up_proj' and .* one num_bits, symmetric and group_size for all")
    model = plain(hidden=72)
    prepare_qat(model, spec(3, group=None), exclude=["lm_head"])
    refused(model, "its 72 inputs do not fill words of 32 bits with 3 bits each")


def test_an_interpreter_without_gptqmodel_is_named(tmp_path: Path) -> None:
    export_packed(model := small(), tmp_path / "gptq", "gptq")
    with pytest.raises(QatkitError, match=r"--python: cannot import gptqmodel: .*made by `qatkit environment gptq`"):
        verify(model, tmp_path / "gptq", batches(), python=Path(sys.executable))


@pytest.mark.slow
@needs_gptqmodel
@pytest.mark.parametrize("weight", SPECS, ids=name_of)
def test_gptqmodel_decodes_the_trained_weights_and_computes_the_trained_outputs(
    weight: QuantSpec, tmp_path: Path
) -> None:
    result = export_model(small(weight), "gptq", tmp_path / "gptq", batches(), python=Path(PYTHON or ""))
    assert result.passed, result.failures
    assert (result.not_run, result.agreement) == ("", 1.0)
    assert result.runtime.startswith("gptqmodel 7.6.0 in transformers ")


@pytest.mark.slow
@needs_gptqmodel
def test_gptqmodel_loads_biases_and_excluded_layers_and_padded_texts(tmp_path: Path) -> None:
    model = qwen()
    prepare_qat(model, spec(), exclude=["lm_head", "*down_proj"])
    padded = {"attention_mask": torch.tensor([[1] * 12 + [0] * 4, [1] * 16])}
    result = export_model(model, "gptq", tmp_path / "gptq", [batches()[0] | padded], python=Path(PYTHON or ""))
    assert result.passed, result.failures
