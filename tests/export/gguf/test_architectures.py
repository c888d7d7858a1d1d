"""Every architecture of GGUF files: transformers computes the trained logits, the gguf package decodes the weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.quants import dequantize
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from qatkit import QatkitError, prepare_qat, scheme
from qatkit.export.formats import FORMATS
from qatkit.export.gguf.architectures import ARCHITECTURES
from qatkit.export.gguf.format import export_gguf
from qatkit.export.gguf.read_back import compare_and_load, compare_data
from qatkit.export.gguf.rope import rope_factors
from qatkit.export.verification import verify
from tests.export.gguf.test_format import BATCH, TOKENS, loaded, logits, tensors
from tests.export.gguf.test_tokenizer import byte_level, wrapped

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
GROUPED = SHAPE | {"num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, head_dim=16, sliding_window=32),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=128),
    "phi3": lambda: transformers.Phi3Config(**GROUPED, pad_token_id=0, eos_token_id=0),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**GROUPED, head_dim=256, sliding_window=8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=1024, initializer_range=0.3
    ),
    "bert": lambda: transformers.BertConfig(**SHAPE),
    "llama, scaled frequencies": lambda: transformers.LlamaConfig(**GROUPED, rope_parameters=LLAMA3),
    "llama, linear scaling": lambda: transformers.LlamaConfig(
        **GROUPED, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "llama, biases": lambda: transformers.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "qwen3, narrow heads": lambda: transformers.Qwen3Config(**GROUPED, head_dim=32),
}
ALONE = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "gpt2"]


def quantized(name: str, **changes: Any) -> nn.Module:
    """A model with Q4_0 weights and random norms and biases."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    factory = AutoModel if config.model_type == "bert" else AutoModelForCausalLM
    model: nn.Module = factory.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) * 0.1
    prepare_qat(model, scheme("Q4_0").weight, exclude=["pooler*" if config.model_type == "bert" else "lm_head"])
    return model


def test_every_architecture_is_tested() -> None:
    assert set(ARCHITECTURES) <= set(CONFIGS)


@pytest.mark.parametrize("name", ALONE)
def test_transformers_computes_the_trained_logits_from_the_file_alone(name: str, tmp_path: Path) -> None:
    model, path, tokenizer = quantized(name), tmp_path / "model.gguf", byte_level()
    tokenizer.pad_token = "<|end|>"  # the padding index of a Phi-3
    export_gguf(model, path, tokenizer)
    assert torch.equal(logits(loaded(path)), logits(model))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "bert"])
def test_every_weight_and_output_is_verified(name: str, tmp_path: Path) -> None:
    model, path = quantized(name), tmp_path / "model.gguf"
    export_gguf(model, path)
    check = verify(model, path, [BATCH])
    assert check.passed, check.failures
    assert (check.mean_error, check.allowed_error) == (0.0, 0.0)
    assert check.quantization_error > 0


def test_the_gguf_package_decodes_the_weights_of_a_bert(tmp_path: Path) -> None:
    model, path = quantized("bert"), tmp_path / "model.gguf"
    export_gguf(model, path, word_pieces(), "mean")
    query = tensors(path)["blk.1.attn_q.weight"]
    expected = model.get_submodule("encoder.layer.1.attention.self.query").fake_quantized_weight()
    assert np.array_equal(dequantize(query.data, query.tensor_type), expected.detach().numpy())
    assert {tensors(path)[name].tensor_type.name for name in ("position_embd.weight", "token_types.weight")} == {"F32"}
    fields = gguf.GGUFReader(path).fields
    assert fields["bert.pooling_type"].contents() == gguf.PoolingType.MEAN
    assert fields["bert.attention.causal"].contents() is False
    words = fields["tokenizer.ggml.tokens"].contents()[:7]
    assert words == [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "\u2581the",
        "s",
        "\u2581fox",
    ]
    assert [fields[f"tokenizer.ggml.{key}_token_id"].contents() for key in ("bos", "eos", "seperator")] == [2, 3, 3]
    assert compare_data(path, word_pieces(), {"pooling": "mean"}) == []
    assert compare_data(path, word_pieces(), {"pooling": "cls"}) == [
        "metadata 'bert.pooling_type' is 1, but 2 in the trained model"
    ]
    read = compare_and_load(model, path)
    assert read.failures == []
    assert read.runtime is not None
    with torch.no_grad():
        assert torch.equal(read.runtime(TOKENS).last_hidden_state, model(TOKENS).last_hidden_state)


def word_pieces() -> Any:
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "##s", "fox"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return wrapped(tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def test_metadata_that_the_config_does_not_have_is_named(tmp_path: Path) -> None:
    model, path = quantized("llama, linear scaling"), tmp_path / "model.gguf"
    export_gguf(model, path)
    plain: Any = quantized("llama")
    plain.load_state_dict(model.state_dict())
    assert compare_and_load(plain, path).failures == [
        f"metadata 'llama.rope.scaling.{key}': the trained model has no such entry" for key in ("type", "factor")
    ]


def test_the_metadata_is_that_of_the_config(tmp_path: Path) -> None:
    model, path = quantized("mistral"), tmp_path / "model.gguf"
    export_gguf(model, path)
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if "llama" in key}
    assert fields == {
        "llama.context_length": 32,  # within its sliding window of 32, a Mistral computes what a Llama does
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.attention.head_count": 4,
        "llama.vocab_size": 300,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
    }


def test_the_factors_of_llama_3_are_those_of_its_formula(tmp_path: Path) -> None:
    """From the code of Llama 3.1: long wavelengths are divided by `factor`, short ones are kept."""
    config = CONFIGS["llama, scaled frequencies"]()
    expected = []
    for index in range(8):
        wavelength = 2 * math.pi * 500000.0 ** (2 * index / 16)
        smooth = min(max((64 / wavelength - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        expected.append(1 / ((1 - smooth) / 8.0 + smooth))
    factors = rope_factors(config)
    assert factors is not None
    assert torch.allclose(factors.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6)
    assert len(set(expected)) > 2, "the formula has three cases"
    export_gguf(quantized("llama, scaled frequencies"), tmp_path / "model.gguf")
    assert np.array_equal(tensors(tmp_path / "model.gguf")["rope_freqs.weight"].data, factors.numpy())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "only with use_sliding_window: False, but the model has True"),
        ("gemma3_text", {"query_pre_attn_scalar": 64}, "only with query_pre_attn_scalar: 256, the width of a head"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 2}, "only with full attention in every sixth layer"),
        ("gpt2", {"activation_function": "relu"}, "activation_function: 'gelu_new', but the model has 'relu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            r"rotary embeddings of type 'yarn'; use export: \{format: dense\}",
        ),
    ],
)  # fmt: skip
def test_settings_that_llama_cpp_does_not_implement_are_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(QatkitError, match=message):
        FORMATS["gguf"].check_model(quantized(name, **changes))


def test_other_architectures_heads_and_unsupported_layers_are_refused() -> None:
    olmo = AutoModelForCausalLM.from_config(transformers.OlmoConfig(**GROUPED))
    with pytest.raises(QatkitError, match="does not support the architecture 'olmo', only llama, mistral, qwen2"):
        FORMATS["gguf"].check_model(olmo)
    classifier = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**GROUPED))
    with pytest.raises(QatkitError, match=r"'score\.weight' has no name in GGUF's architecture 'llama'"):
        FORMATS["gguf"].check_model(classifier)
    bert = AutoModel.from_config(CONFIGS["bert"]())
    prepare_qat(bert, layers={"pooler.dense": scheme("Q8_0")})
    with pytest.raises(QatkitError, match=r"GGUF files of 'bert' do not store 'pooler\.dense\.weight'"):
        FORMATS["gguf"].check_model(bert)
    bert = AutoModel.from_config(CONFIGS["bert"]())
    prepare_qat(bert, layers={"embeddings.position_embeddings": scheme("Q8_0")})
    with pytest.raises(QatkitError, match=r"llama\.cpp reads position and token type embeddings only in float32"):
        FORMATS["gguf"].check_model(bert)
    with pytest.raises(QatkitError, match="pooling: unknown pooling 'average'; use one of none, mean"):
        export_gguf(AutoModel.from_config(CONFIGS["bert"]()), Path("unused.gguf"), pooling="average")
