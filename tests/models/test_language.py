"""Language models: the small Llama has the parts of its family; saved ones are loaded, and what cannot be is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qatkit import QatkitError
from qatkit.models import causal_lm, llama


def test_it_has_the_parameters_that_its_shape_says() -> None:
    hidden, layers, heads, kv_heads, intermediate, vocab = 48, 2, 6, 3, 64, 300
    model = llama(vocab, hidden, layers, heads, kv_heads, intermediate, context=16, tie_embeddings=True)
    attention = 2 * hidden * hidden + 2 * hidden * hidden * kv_heads // heads
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    assert sum(parameter.numel() for parameter in model.parameters()) == vocab * hidden + layers * layer + hidden
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = llama(vocab, hidden, layers, heads, kv_heads, intermediate, context=16, tie_embeddings=False)
    assert sum(parameter.numel() for parameter in untied.parameters()) == 2 * vocab * hidden + layers * layer + hidden


def test_a_token_changes_no_output_before_it() -> None:
    model = llama(300, 32, 1, 2, 1, 48, 16).eval()
    first = torch.randint(300, (1, 8))
    second = first.clone()
    second[0, 5] = (second[0, 5] + 1) % 300
    with torch.no_grad():
        before, after = model(first).logits, model(second).logits
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_plain_transformers_loads_what_it_saves(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = llama(300, 32, 1, 2, 1, 48, 16).eval()
    model.save_pretrained(tmp_path)
    tokens = torch.randint(300, (2, 9))
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(QatkitError, match=r"heads: 5 does not divide hidden=192 into heads of an even width"):
        llama(heads=5, kv_heads=1)
    with pytest.raises(QatkitError, match=r"kv_heads: 4 does not divide heads=6; use a divisor of 6"):
        llama(kv_heads=4)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    llama(300, 32, 1, 2, 1, 48, 16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_is_loaded_with_its_weights_in_the_wanted_dtype(saved: Path) -> None:
    torch.manual_seed(0)
    expected = llama(300, 32, 1, 2, 1, 48, 16).state_dict()
    for dtype in ("float32", "bfloat16"):
        model = causal_lm(str(saved), dtype=dtype)
        for key, value in model.state_dict().items():
            assert torch.equal(value, expected[key].to(getattr(torch, dtype))), key
    assert not model.config.use_cache
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_gradient_checkpointing_gives_the_same_gradients(saved: Path) -> None:
    tokens, gradients = torch.randint(300, (2, 9)), []
    for checkpointing in (False, True):
        model = causal_lm(str(saved), gradient_checkpointing=checkpointing).train()
        assert model.model.layers[0].gradient_checkpointing == checkpointing
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    assert torch.equal(*gradients)


def test_on_the_meta_device_no_weight_is_read(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"not weights")
    with torch.device("meta"):
        model = causal_lm(str(saved))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_what_cannot_be_loaded_is_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(
        QatkitError, match=r"name_or_path: '.*/nothing' is not a folder; use a folder that contains config\.json"
    ):
        causal_lm(str(tmp_path / "nothing"))
    with pytest.raises(QatkitError, match=r"name_or_path: .* has no readable config\.json"):
        causal_lm(str(tmp_path))
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(QatkitError, match=r"name_or_path: .* cannot be loaded as a causal language model"):
        causal_lm(str(saved))
    (saved / "model.safetensors").unlink()
    with pytest.raises(QatkitError, match=r"name_or_path: .* contains no \.safetensors file"):
        causal_lm(str(saved))
    (saved / "config.json").write_text("{}")
    with pytest.raises(QatkitError, match=r"config\.json has no model_type"):
        causal_lm(str(saved))


def test_without_a_network_a_cached_model_of_the_hub_is_loaded_and_another_is_refused_at_once(
    saved: Path, tmp_path: Path
) -> None:
    # as huggingface_hub lays out its cache
    cached = tmp_path / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(saved, cached / "snapshots" / ("0" * 40))
    code = "from qatkit.models import causal_lm; print(type(causal_lm('some/model'))); causal_lm('some/other')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "LlamaForCausalLM" in result.stdout
    said = result.stderr.strip().splitlines()[-1]
    assert "name_or_path: 'some/other' is not a folder, and the request to the hub failed" in said
    assert "when the network is available" in said
