"""Scales that move between layers leave the function of every known model as it is."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from qatkit import QatkitError, QuantSpec, prepare_qat
from qatkit.quantization.ptq.equivalence import apply_fold, find_folds, fold_matrices, parameter_uses
from tests.quantization.ptq.models import CONFIGS, output, tiny, tokens

# per model of two blocks: norm -> q/k/v, v -> o, norm -> mlp, and what is inside the mlp
FOLDS = {
    "llama": 8, "llama_gqa": 6, "mistral": 8, "qwen2": 8, "qwen3": 8, "gemma": 8, "gemma2": 8, "gemma3": 8, "gpt2": 4,
    "opt": 8, "opt_norm_after": 4, "opt_gelu": 6, "bert": 2, "bert_relu": 4,
}  # fmt: skip


def scramble(model: nn.Module) -> int:
    """Move random scales through every edge of a model; returns how many there were."""
    folds = find_folds(model, parameter_uses(model))
    for fold in folds:
        apply_fold(fold, torch.rand(fold_matrices(fold)[0].shape[1]) * 4 + 0.2)
    return len(folds)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("prepared", [False, True])
def test_the_float_model_computes_what_it_did(name: str, prepared: bool) -> None:
    model = tiny(name)
    expected = output(model, tokens())
    weights = [p.clone() for p in model.parameters()]
    if prepared:
        prepare_qat(model, weight=QuantSpec(8))
    assert scramble(model) == FOLDS[name]
    assert not all(torch.equal(p, before) for p, before in zip(model.parameters(), weights, strict=False))
    if not prepared:
        torch.testing.assert_close(output(model, tokens()), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_linear_layers_with_relu_between_are_found_in_sequentials_and_shared_ones_are_not() -> None:
    shared = nn.Linear(6, 6)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6), shared, nn.ReLU(), shared
    ).eval()
    x = torch.randn(5, 4)
    expected = model(x)
    folds = find_folds(model, parameter_uses(model))
    assert [(fold.producer, fold.consumers) for fold in folds] == [(model[0], (model[3],))]
    scramble(model)
    torch.testing.assert_close(model(x), expected)


def test_adapters_have_to_be_merged_first() -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(QatkitError, match=r"'self_attn.q_proj' of LlamaDecoderLayer is a Linear, .* merge adapters"):
        find_folds(model, parameter_uses(model))
