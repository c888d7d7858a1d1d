"""GGUF files in llama.cpp: it loads every type, architecture and tokenizer, and predicts what the model predicts.

llama.cpp stores keys and values in float16, and quantizes activations to 8 bits if the weight is quantized. So files
with the quantized values in float32 show that it computes the same model, and files with codes that it decodes them.
With keys and values in float32, they also show that it quantizes activations like the schemes that end in "_A8".
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor, nn

from qatkit import prepare_qat, scheme
from qatkit.export.gguf.format import export_gguf
from qatkit.export.gguf.packing import BLOCK_TYPES
from qatkit.export.gguf.tokenizer import SPLITS
from qatkit.models import llama
from qatkit.quantization.prepare import qat_layers, strip_qat
from tests.export.gguf.test_architectures import CONFIGS, quantized, word_pieces
from tests.export.gguf.test_tokenizer import byte_level, sentencepiece

FOLDER = os.environ.get("QATKIT_LLAMA_CPP")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason="QATKIT_LLAMA_CPP names no folder with node-llama-cpp"),
]
TOKENS = torch.randint(290, (2, 16), generator=torch.Generator().manual_seed(1))
MANY = torch.randint(290, (12, 48), generator=torch.Generator().manual_seed(1))
BOUND = 0.25
"""Largest difference of a log-probability that changed codes of activations may make."""
TEXTS = [
    "The quick brown fox, isn't it?",
    "DON'T shout!! x_1 = y//2\n\n\n end ",
    "ÄÖÜ über 1234567890",
    "naïve 狐  done",
]
SENTENCES = ["The fox foxs", "thes thes fox", "Unknown fox"]
DECODERS = [name for name in CONFIGS if name != "bert"]
TOKENIZERS: dict[str, Any] = {name: (lambda split=split: byte_level(split)) for split, name in SPLITS.items()}
TOKENIZERS["sentencepiece"] = sentencepiece


def with_values(model: nn.Module) -> nn.Module:
    """The plain model with the quantized values as its weights."""
    plain = copy.deepcopy(model)
    values = {name: layer.fake_quantized_weight().detach() for name, layer in qat_layers(plain)}
    strip_qat(plain)
    for name, value in values.items():
        plain.get_parameter(f"{name}.weight").data = value
    return plain


def typed(name: str, suffix: str = "") -> nn.Module:
    """A Llama with all matrices in one type.

    The suffix "_A8" quantizes the inputs of linear layers. The embeddings are then not quantized: inputs on a grid of
    16 values would lie on rounding boundaries, which trained norms move them away from.
    """
    torch.manual_seed(0)
    model = llama(300, 256, 2, 4, 2, 256, 64, tie_embeddings=False).eval()
    for parameter in model.parameters():
        parameter.data *= 5 if parameter.dim() == 2 else 1
    own = {"MXFP4": "MXFP4A16", "NVFP4": "NVFP4_UE4M3"}.get(name, name)
    found = scheme(own.removesuffix("A16") + suffix if suffix else own)
    prepare_qat(model, layers={"*_proj": found, "lm_head": found} | ({} if suffix else {"model.embed_tokens": found}))
    return model


def without_inputs(model: nn.Module) -> nn.Module:
    """The same model with quantized weights alone."""
    model = copy.deepcopy(model)
    for _, layer in qat_layers(model):
        layer.input_fake_quant = None
    return model


def bert_tokenizer() -> Any:
    tokenizer = word_pieces()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    post = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = post
    return tokenizer


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What llama.cpp computes for every file, by name; one process loads them all."""
    folder, jobs = tmp_path_factory.mktemp("llama_cpp"), {}
    rows, tokenizer = TOKENS.tolist(), byte_level()
    tokenizer.pad_token = "<|end|>"

    def add(name: str, model: nn.Module, tokenizer: Any, pooling: str = "none", **job: Any) -> None:
        path = folder / f"{len(jobs)}.gguf"
        export_gguf(model, path, tokenizer, pooling)
        jobs[name] = {"path": str(path), **job}

    for name in DECODERS:
        add(name, with_values(quantized(name)), tokenizer, rows=rows)
    add("F16", typed("F16"), tokenizer, rows=rows)
    for name in BLOCK_TYPES:
        add(name, typed(name), tokenizer, rows=rows)
        add(f"precise {name}", typed(name, "_A8"), tokenizer, rows=MANY.tolist(), precise=True)
    for name, make in TOKENIZERS.items():
        add(f"tokenizer {name}", llama(400, 32, 1, 2, 1, 32, 16), make(), texts=TEXTS)
    for pooling in ("mean", "cls"):
        add(pooling, with_values(quantized("bert")), bert_tokenizer(), pooling, sentences=SENTENCES)
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    script = Path(__file__).parents[2] / "support" / "llama_cpp.mjs"
    subprocess.run(["node", str(script), str(folder / "jobs.json"), str(folder / "out.json")], cwd=FOLDER, check=True)
    return dict(zip(jobs, json.loads((folder / "out.json").read_text()), strict=True))


@torch.no_grad()
def compared(model: Any, result: dict[str, Any]) -> tuple[float, float, float, float]:
    """Top-1 agreement, the mean and largest difference of log-probabilities above -12, and the largest margin of the
    two most probable tokens where the most probable one differs.
    """
    expected: Tensor = model(MANY).logits.log_softmax(-1)
    found = torch.full_like(expected, -torch.inf)
    for row, positions in enumerate(result["probabilities"]):
        for position, pairs in enumerate(positions):
            ids, values = zip(*pairs, strict=True)
            found[row, position, list(ids)] = torch.tensor(values).log()
    apart = (expected - found)[(expected > -12) & (found > -12)].abs()
    other = expected.argmax(-1) != found.argmax(-1)
    first, second = expected[other].topk(2).values.T
    margin = float((first - second).max()) if other.any() else 0.0
    return 1 - float(other.float().mean()), float(apart.mean()), float(apart.max()), margin


@torch.no_grad()
def distance(model: Any, result: dict[str, Any]) -> float:
    """The mean total variation distance of the predictions of the model and of llama.cpp."""
    expected: Tensor = model(TOKENS).logits.softmax(-1)
    found = torch.zeros_like(expected)
    for row, positions in enumerate(result["probabilities"]):
        for position, pairs in enumerate(positions):
            for token, probability in pairs:
                found[row, position, token] = probability
    assert torch.allclose(found.sum(-1), torch.ones(TOKENS.shape), atol=1e-3)
    return float((expected - found).abs().sum(-1).mean() / 2)


@pytest.mark.parametrize("name", DECODERS)
def test_it_computes_what_the_model_of_every_architecture_computes(name: str, results: dict[str, Any]) -> None:
    assert distance(quantized(name), results[name]) < 3e-3


@pytest.mark.parametrize("name", ["F16", *BLOCK_TYPES])
def test_it_decodes_every_type(name: str, results: dict[str, Any]) -> None:
    """Its own quantization of activations changes predictions less than the quantization of the weights does."""
    model = typed(name)
    plain = copy.deepcopy(model)
    strip_qat(plain)
    assert distance(model, results[name]) < 0.03
    assert distance(model, results[name]) < distance(plain, results[name])


@pytest.mark.parametrize("name", list(BLOCK_TYPES))
def test_it_quantizes_activations_as_training_does(name: str, results: dict[str, Any]) -> None:
    model, result = typed(name, "_A8"), results[f"precise {name}"]
    before, after = compared(without_inputs(model), result), compared(model, result)
    assert after[1] < before[1] * 0.2, (before, after)
    assert after[0] > max(before[0], 0.98), (before, after)
    assert after[2] < BOUND, (before, after)
    assert after[3] < 2 * BOUND, (before, after)


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_it_splits_texts_into_the_same_tokens(name: str, results: dict[str, Any]) -> None:
    tokenizer = TOKENIZERS[name]()
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert results[f"tokenizer {name}"]["tokens"] == expected


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_it_computes_the_embeddings_of_a_bert(pooling: str, results: dict[str, Any]) -> None:
    model, tokenizer = quantized("bert"), bert_tokenizer()
    for sentence, vector in zip(SENTENCES, results[pooling]["vectors"], strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
        expected = hidden.mean(0) if pooling == "mean" else hidden[0]
        assert torch.cosine_similarity(expected, torch.tensor(vector), dim=0) > 0.99999
