"""Shrunk models equal the original ones with the removed parts switched off, also after save and load."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

from qatkit import QatkitError
from qatkit.pruning.structure import Importance, Shape, importance, shrink

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def model(config: Any = None) -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config or LlamaConfig(**SIZES)).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def batches() -> list[Tensor]:
    return [torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def same(a: Any, b: Any, tolerance: float = 1e-4) -> None:
    with torch.no_grad():
        for tokens in batches():
            torch.testing.assert_close(a(tokens).logits, b(tokens).logits, atol=tolerance, rtol=1e-4)


def lowest(scores: Tensor, keep: int) -> list[int]:
    return scores.argsort()[: len(scores) - keep].tolist()


def test_a_model_with_fewer_neurons_equals_the_original_with_their_outputs_off() -> None:
    dense = model()
    scores = importance(dense, batches())
    small = shrink(dense, scores, Shape(neurons=20))
    assert small.model.layers[0].mlp.gate_proj.weight.shape == (20, 32)
    for index, layer in enumerate(dense.model.layers):
        layer.mlp.down_proj.weight.data[:, lowest(scores.neurons[index], 20)] = 0
    same(small, dense)


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (6, 3), (4, 4), (3, 3), (None, 1)])
def test_a_model_with_fewer_heads_equals_the_original_with_their_outputs_off(heads: int | None, groups: int) -> None:
    config = Qwen3Config(**SIZES, head_dim=4)
    dense = model(config)
    scores = importance(dense, batches())
    small = shrink(dense, scores, Shape(heads=heads, kv_heads=groups))
    per_group = (heads or 2 * groups) // groups
    for index, layer in enumerate(dense.model.layers):
        kept = []
        by_group = scores.heads[index].view(4, 2)
        for group in sorted(by_group.sum(dim=1).argsort()[4 - groups :].tolist()):
            kept += [2 * group + query for query in by_group[group].argsort()[2 - per_group :].tolist()]
        off = [head for head in range(8) if head not in kept]
        layer.self_attn.o_proj.weight.data.view(32, 8, 4)[:, off] = 0
    assert small.config.num_attention_heads == per_group * groups
    assert small.config.num_key_value_heads == groups
    same(small, dense)


def test_a_model_with_fewer_layers_equals_the_original_that_skips_them() -> None:
    dense = model()
    scores = importance(dense, batches())
    small = shrink(dense, scores, Shape(layers=2))
    kept = sorted(scores.layers.argsort()[2:].tolist())
    for index in range(4):
        if index not in kept:
            dense.model.layers[index].self_attn.o_proj.weight.data.zero_()
            dense.model.layers[index].mlp.down_proj.weight.data.zero_()
    same(small, dense)


def test_layers_of_different_types_keep_their_types(tmp_path: Path) -> None:
    config = SmolLM3Config(**SIZES, pad_token_id=0, no_rope_layers=[0, 1, 1, 0])
    dense = model(config)
    scores = replace(importance(dense, batches()), layers=torch.tensor([0.0, 2, 1, 3]))
    small = shrink(dense, scores, Shape(layers=2))
    assert small.config.no_rope_layers == [1, 0]
    assert dense.config.no_rope_layers == [0, 1, 1, 0]
    small.save_pretrained(tmp_path)
    for index in (0, 2):
        dense.model.layers[index].self_attn.o_proj.weight.data.zero_()
        dense.model.layers[index].mlp.down_proj.weight.data.zero_()
    same(small, dense)
    same(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), dense)


def test_a_classifier_reads_the_remaining_channels_of_the_stream() -> None:
    torch.manual_seed(0)
    dense = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3, pad_token_id=0)).eval()
    scores = importance(dense, batches())
    small = shrink(dense, scores, Shape(layers=3, hidden=24, neurons=20, heads=4, kv_heads=2))
    kept = sorted(scores.hidden.argsort()[32 - 24 :].tolist())
    assert torch.equal(small.score.weight, dense.score.weight[:, kept])
    assert small(batches()[0]).logits.shape == (2, 3)
    fewer = shrink(dense, scores, Shape(neurons=20))
    for index, layer in enumerate(dense.model.layers):
        layer.mlp.down_proj.weight.data[:, lowest(scores.neurons[index], 20)] = 0
    same(fewer, dense)


def test_a_model_with_fewer_channels_equals_the_original_whose_stream_leaves_them_empty() -> None:
    dense = model()
    scores = importance(dense, batches())
    small = shrink(dense, scores, Shape(hidden=24))
    off = lowest(scores.hidden, 24)
    for name, parameter in dense.named_parameters():
        if "embed_tokens" in name:
            parameter.data[:, off] = 0
        elif "o_proj" in name or "down_proj" in name:
            parameter.data[off] = 0
        elif "norm" in name:
            parameter.data *= (24 / 32) ** 0.5  # the mean of squares is taken over fewer
    same(small, dense, 1e-3)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        Qwen2Config(**SIZES),
        Qwen3Config(**SIZES, head_dim=4),
        MistralConfig(**SIZES, sliding_window=4),
        GraniteConfig(**SIZES),
        SmolLM3Config(**SIZES, pad_token_id=0),
    ],
    ids=["llama", "qwen2", "qwen3", "mistral", "granite", "smollm3"],
)
def test_plain_from_pretrained_loads_the_shrunk_model(config: Any, tmp_path: Path) -> None:
    dense = model(config).to(torch.bfloat16)
    before = copy.deepcopy(dense.state_dict())
    small = shrink(dense, importance(dense, batches()), Shape(layers=3, hidden=24, neurons=32, heads=4, kv_heads=2))
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.dtype is torch.bfloat16
    assert len(loaded.model.layers) == 3
    for name, value in small.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(loaded(batches()[0]).logits, small(batches()[0]).logits)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_parts_without_activation_have_the_lowest_score() -> None:
    dense = model()
    dense.model.layers[1].mlp.up_proj.weight.data[7] = 0
    dense.model.layers[2].self_attn.v_proj.weight.data[:4] = 0  # the first group of two heads
    dense.model.layers[3].self_attn.o_proj.weight.data.zero_()
    dense.model.layers[3].mlp.down_proj.weight.data.zero_()
    scores = importance(dense, batches())
    assert scores.neurons[1].argmin() == 7
    assert sorted(scores.heads[2].argsort()[:2].tolist()) == [0, 1]
    assert scores.layers.argmin() == 3


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(layers=5), "layers: 5 is out of range; use an integer from 1 to 4"),
        (Shape(neurons=0), "neurons: 0 is out of range; use an integer from 1 to 48"),
        (Shape(heads=6), "heads: 6 query heads cannot be divided among 4 key-value heads"),
        (Shape(heads=8, kv_heads=2), "use a multiple of 2 up to 4"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(shape: Shape, message: str) -> None:
    dense = model()
    with pytest.raises(QatkitError, match=message):
        shrink(dense, importance(dense, batches()), shape)


def test_unsupported_models_are_refused() -> None:
    scores = Importance(torch.ones(4), torch.ones(32), torch.ones(4, 48), torch.ones(4, 8))
    with pytest.raises(QatkitError, match="Sequential is not a Llama-like transformer"):
        shrink(nn.Sequential(nn.Linear(2, 2)), scores, Shape())
    stable = model(StableLmConfig(**SIZES))  # its heads are always as wide as all of them fill the stream
    for shape in (Shape(kv_heads=2), Shape(hidden=24)):
        with pytest.raises(
            QatkitError, match=r"StableLmForCausalLM with .* its config cannot express .*; shrink other parts"
        ):
            shrink(stable, scores, shape)
    with pytest.raises(QatkitError, match=r"with {'hidden_size': 30, .*} cannot be built \(ValueError"):
        shrink(stable, scores, Shape(hidden=30))
    assert shrink(stable, scores, Shape(neurons=8)).config.intermediate_size == 8
    with pytest.raises(QatkitError, match="batches: no batches were passed"):
        importance(model(), [])
