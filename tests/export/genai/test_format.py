"""Folders for onnxruntime-genai: exact codes, logits at once and token by token, and every change is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from qatkit import QatkitError, QuantSpec, Scheme, prepare_qat
from qatkit.export.formats import FORMATS, format_of_path
from qatkit.export.genai.format import export_genai
from qatkit.export.genai.runtime import compare_data
from qatkit.export.verification import Verification, verify
from qatkit.models import untrained_model
from tests.export.gguf.test_tokenizer import byte_level
from tests.support import warm

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 96, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
TOKENS = torch.randint(0, 300, (3, 32), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": TOKENS, "labels": TOKENS}
INT4 = QuantSpec(4, strategy="group", group_size=32)
UNSIGNED = QuantSpec(4, strategy="group", group_size=32, symmetric=False)
EMBEDDED = "model.embed_tokens.weight.codes"


def made(kind: str = "llama", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = untrained_model(kind, "CausalLM", SHAPE | options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) * 0.1
    return model


@pytest.fixture(scope="module", autouse=True)
def _forked_builders() -> Iterator[None]:
    with warm.children():
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A Llama with unsigned int4 weights, an int2 embedding, a biased and a floating-point layer."""
    model = made(attention_bias=True)
    layers = {"model.embed_tokens": Scheme(QuantSpec(2, strategy="group", group_size=32))}
    prepare_qat(model, UNSIGNED, exclude=["model.layers.1.mlp.up_proj"], layers=layers)
    return model


@pytest.fixture(scope="module")
def folder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genai") / "model"
    export_genai(model, folder, byte_level())
    return folder


def test_codes_are_equal_and_logits_are_those_of_training(model: nn.Module, folder: Path) -> None:
    result = verify(model, folder, [BATCH])
    assert result.failures == []
    assert (result.format, result.layers, result.agreement) == ("onnx_genai", 15, 1.0)
    assert result.mean_error is not None
    assert result.mean_error < 1e-5 * result.quantization_error
    assert compare_data(folder, byte_level(), BATCH) == []
    kinds = [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]
    assert (kinds.count("MatMulNBits"), kinds.count("GatherBlockQuantized"), kinds.count("MatMul")) == (14, 1, 1)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_a_padded_text_is_read_token_by_token_up_to_its_end(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    mask = torch.ones(3, 32, dtype=dtype)
    mask[0, 10:] = 0
    result = verify(model, folder, [BATCH | {"attention_mask": mask, "labels": TOKENS.where(mask.bool(), -100)}])
    assert result.failures == []


def test_a_text_that_fills_the_context_is_read_token_by_token(tmp_path: Path) -> None:
    model, tokens = made(max_position_embeddings=16), TOKENS[:, :16]
    prepare_qat(model, INT4)
    export_genai(model, tmp_path / "model", byte_level())
    assert verify(model, tmp_path / "model", [{"input_ids": tokens, "labels": tokens}]).failures == []


def test_greedy_text_equals_that_of_transformers(model: nn.Module, folder: Path) -> None:
    expected = model.generate(TOKENS[:1, :8], max_new_tokens=24, do_sample=False, eos_token_id=None)  # type: ignore[operator]
    runtime = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(runtime)
    parameters.set_search_options(max_length=32, min_length=32, do_sample=False)
    generator = onnxruntime_genai.Generator(runtime, parameters)
    generator.append_tokens(TOKENS[:1, :8].numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0)) == expected[0].tolist()


def test_the_file_has_the_size_of_its_codes(model: nn.Module, folder: Path) -> None:
    row = format_of_path(folder)
    assert row.name == "onnx_genai"
    assert row.size(folder) == sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    codes = sum(module.weight.numel() for name, module in model.named_modules() if name.endswith("_proj"))
    assert row.size(folder) < codes * 4 / 2


def change_tensor(name: str, change: Callable[[np.ndarray[Any, Any]], None]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        proto = onnx.load(folder / "model.onnx")
        tensor = next(each for each in proto.graph.initializer if each.name == name)
        values = numpy_helper.to_array(tensor).copy()
        change(values)
        tensor.CopyFrom(numpy_helper.from_array(values, name))
        onnx.save(proto, folder / "model.onnx")

    return changed


def one_ulp(values: np.ndarray[Any, Any]) -> None:
    values.flat[5] = np.nextafter(values.flat[5], np.float32(1))


def one_bit(values: np.ndarray[Any, Any]) -> None:
    values.flat[7] ^= 1


def swap_rows(values: np.ndarray[Any, Any]) -> None:
    values[[0, 1]] = values[[1, 0]]


def halve(values: np.ndarray[Any, Any]) -> None:
    values[3] /= 2


def another_context(folder: Path) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["context_length"] = 64
    (folder / "genai_config.json").write_text(json.dumps(config))


def another_level(folder: Path) -> None:
    proto = onnx.load(folder / "model.onnx")
    node = next(node for node in proto.graph.node if node.op_type == "MatMulNBits")
    next(attribute for attribute in node.attribute if attribute.name == "accuracy_level").i = 4
    onnx.save(proto, folder / "model.onnx")


def cut_off(folder: Path) -> None:
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:500])


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_tensor(f"{Q}.weight.scale", one_ulp), f"layer '{Q}': scales of the weight"),
        (change_tensor(f"{Q}.weight.codes", one_bit), f"layer '{Q}': codes of the weight"),
        (change_tensor(f"{Q}.weight.codes", swap_rows), f"layer '{Q}': codes of the weight"),
        (change_tensor(f"{Q}.weight.zero_point", one_bit), f"layer '{Q}': zero points of the weight"),
        (change_tensor(f"{Q}.bias", halve), f"'{Q}.bias': model.onnx does not contain these values"),
        (change_tensor(EMBEDDED, one_bit), "layer 'model.embed_tokens': codes of the weight"),
        (
            change_tensor("model.layers.1.mlp.up_proj.MatMul.weight", halve),
            "'model.layers.1.mlp.up_proj.weight': model.onnx does not contain these values",
        ),
        (another_context, "genai_config.json: context_length is 64, but 128 in the trained model"),
        (another_level, f"layer '{Q}': its node has accuracy level 4, but it was trained for level 0"),
        (cut_off, "model cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_change_is_found_and_named(
    model: nn.Module, folder: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    change(tmp_path / "model")
    result: Verification = verify(model, tmp_path / "model", [BATCH])
    assert not result.passed
    assert said in result.failures[0], result.failures


def test_another_end_of_text_is_found(folder: Path) -> None:
    other = byte_level()
    other.eos_token = "a"
    assert compare_data(folder, other, BATCH) == [  # 2 is that of the config
        f"genai_config.json: eos_token_id is [0, 2], but {other.eos_token_id} in the tokenizer of the data"
    ]


@pytest.mark.parametrize(
    ("kind", "options", "scheme", "said"),
    [
        ("gpt2", {}, Scheme(INT4), "model_type llama, mistral, qwen2, qwen3, but the model is a GPT2LMHeadModel"),
        ("llama", {}, Scheme(QuantSpec(8)), "'model.layers.0.self_attn.q_proj': 'onnx_genai' supports only linear"),
        ("mistral", {"sliding_window": 16}, Scheme(INT4), "attends to the last 16 of 128 tokens"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
            Scheme(INT4),
            "does not scale rotary embeddings of type 'linear' as transformers does",
        ),
    ],
)
def test_models_that_it_cannot_hold_are_refused_before_training(
    kind: str, options: dict[str, Any], scheme: Scheme, said: str
) -> None:
    shape = {"n_embd": 64, "n_head": 2, "n_layer": 1, "vocab_size": 300} if kind == "gpt2" else SHAPE
    model = untrained_model(kind, "CausalLM", shape | options)
    layers = [name for name, module in model.named_modules() if name.endswith(("_proj", "c_fc"))]
    with pytest.raises(QatkitError, match=said.replace(".", r"\.")):
        FORMATS["onnx_genai"].check_model(model, dict.fromkeys(layers, scheme))


def test_half_precision_and_a_missing_tokenizer_are_refused() -> None:
    with pytest.raises(QatkitError, match="is bfloat16, but the weights are decoded to float32"):
        FORMATS["onnx_genai"].check_model(made().bfloat16(), {})
    with pytest.raises(QatkitError, match="stores a tokenizer beside the model, but the data has none"):
        FORMATS["onnx_genai"].call("check_tokenizer", None)


def test_a_failed_build_leaves_the_old_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder, tmp_path / "model")
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    with pytest.raises(QatkitError, match="the model builder of onnxruntime-genai failed"):
        export_genai(made(), tmp_path / "model", byte_level())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert (tmp_path / "model" / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "scheme"),
    [
        ("llama", {}, Scheme()),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
            Scheme(INT4),
        ),
        ("llama", {"tie_word_embeddings": True}, Scheme(INT4, QuantSpec(8, strategy="group", group_size=32))),
        ("mistral", {"head_dim": 32, "sliding_window": None}, Scheme(INT4)),
        ("qwen2", {"tie_word_embeddings": True}, Scheme(INT4)),
        ("qwen3", {"head_dim": 32}, Scheme(QuantSpec(3, strategy="group", group_size=32))),
    ],
)
def test_every_architecture_computes_the_trained_logits(
    kind: str, options: dict[str, Any], scheme: Scheme, tmp_path: Path
) -> None:
    model = made(kind, **options)
    if scheme.weight is not None:
        tied = {"model.embed_tokens": Scheme(scheme.weight), "lm_head": Scheme(scheme.weight)}
        prepare_qat(model, scheme.weight, scheme.activation, layers=tied)
    export_genai(model, tmp_path / "model", byte_level())
    result = verify(model, tmp_path / "model", [BATCH])
    assert result.failures == []
    assert result.agreement == 1.0
