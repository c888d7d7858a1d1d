"""Folders for openvino-genai: exact codes, logits and greedy texts, and every change is found."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qatkit import QatkitError, QuantSpec, Scheme, prepare_qat
from qatkit.export.formats import FORMATS, format_of_path
from qatkit.export.verification import verify
from tests.export.genai.test_format import BATCH, INT4, UNSIGNED, byte_level, made

pytest.importorskip("openvino_genai", reason="requires pip install 'qatkit[openvino-genai]'")
from qatkit.export.openvino_genai.format import export_openvino_genai
from qatkit.export.openvino_genai.generation import generate
from qatkit.export.openvino_genai.read_back import compare_data

pytestmark = pytest.mark.medium
LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A Llama with unsigned int4 weights, biases, an int8 layer and a floating-point layer."""
    model = made(attention_bias=True)
    layers = {"lm_head": Scheme(QuantSpec(8))}
    prepare_qat(model, UNSIGNED, exclude=["model.layers.1.mlp.up_proj"], layers=layers)
    return model


@pytest.fixture(scope="module")
def folder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genai") / "model"
    export_openvino_genai(model, folder, byte_level())
    return folder


def test_a_folder_passes_and_generates(model: nn.Module, folder: Path) -> None:
    result = verify(model, folder, [BATCH], threads=1)
    assert result.passed, result.failures
    assert result.agreement == 1.0
    assert format_of_path(folder).name == "openvino_genai"
    assert compare_data(folder, byte_level(), BATCH) == []
    ids = byte_level()("a text", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]  # type: ignore[operator]
    assert "".join(generate(folder, "a text", 6, None)) == byte_level().decode(expected, skip_special_tokens=True)


def test_padding_on_the_right_is_computed_and_on_the_left_refused(model: nn.Module, folder: Path) -> None:
    mask = torch.ones_like(BATCH["input_ids"])
    mask[1, 20:] = 0
    labels = BATCH["labels"].masked_fill(mask == 0, -100)
    assert verify(model, folder, [BATCH | {"attention_mask": mask, "labels": labels}], threads=1).passed
    with pytest.raises(QatkitError, match="a text is padded on the left; pad on the right"):
        verify(model, folder, [BATCH | {"attention_mask": mask.flip(1)}], threads=1)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
@pytest.mark.slow
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"sliding_window": None} if kind == "mistral" else {}
    model = made(kind, **more)
    prepare_qat(model, INT4, exclude=["lm_head"])
    export_openvino_genai(model, tmp_path / "model", byte_level())
    result = verify(model, tmp_path / "model", [BATCH], threads=1)
    assert result.passed, result.failures


@pytest.mark.parametrize(
    ("part", "name"),
    [("codes", "codes"), ("scale", "scales"), ("zero_point", "zero points")],
)
def test_one_changed_bit_is_found_and_named(
    part: str, name: str, model: nn.Module, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    xml = (folder / "openvino_model.xml").read_text()
    data = re.search(rf'name="{re.escape(LAYER)}\.weight\.{part}".*?offset="(\d+)"', xml, re.DOTALL)
    assert data is not None
    file = tmp_path / "model" / "openvino_model.bin"
    content = bytearray(file.read_bytes())
    content[int(data[1])] ^= 1  # the last bit of a code or zero point, or one ulp of a scale
    file.write_bytes(content)
    failures = verify(model, tmp_path / "model", [BATCH], threads=1).failures
    assert f"'{LAYER}.weight.{part}': 1 of" in failures[0]
    assert name in failures[0]


def test_a_changed_parameter_a_foreign_model_and_another_tokenizer_are_found(
    model: nn.Module, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    other = made(attention_bias=True)
    prepare_qat(other, UNSIGNED, exclude=["model.layers.1.mlp.up_proj"], layers={"lm_head": Scheme(QuantSpec(8))})
    with torch.no_grad():
        next(parameter for name, parameter in other.named_parameters() if name == "model.norm.weight")[3] += 1e-6
    failures = verify(other, folder, [BATCH], threads=1).failures
    assert "'model.norm.weight': openvino_model.xml does not contain these values" in failures
    short = byte_level("abcabc", vocab_size=280)
    assert any("encodes a text differently" in failure for failure in compare_data(folder, short, BATCH))
    (tmp_path / "model" / "openvino_model.bin").write_bytes(b"")
    assert "model cannot be read" in verify(model, tmp_path / "model", [BATCH], threads=1).failures[0]


def test_what_the_format_does_not_support_is_refused_with_the_fix() -> None:
    def refused(model: nn.Module, message: str) -> None:
        with pytest.raises(QatkitError, match=message):
            FORMATS["openvino_genai"].check_model(model)

    refused(nn.Linear(4, 4), "supports only causal language models of model_type llama, .* but the model is a Linear")
    refused(made("mistral", sliding_window=16), "attends to the last 16 of 128 tokens only")
    model = made()
    prepare_qat(model, QuantSpec(3))
    refused(model, "supports only integer weights of 4 or 8 bits with scales per output channel or group")
    model = made()
    prepare_qat(model, INT4, QuantSpec(8, strategy="token"))
    refused(model, "supports only integer weights of 4 or 8 bits .* remove activation")
    model = made()
    prepare_qat(model, INT4, include=["*", "model.embed_tokens"])
    refused(model, "'openvino_genai' supports only linear layers, but this is a QATEmbedding")
    refused(made().to(torch.bfloat16), "is bfloat16, but the weights are decoded to float32")
    with pytest.raises(QatkitError, match="stores a tokenizer beside the model, but the data has none"):
        FORMATS["openvino_genai"].call("check_tokenizer", None)
