"""The small Llama: its parts are those of the paper's family, and it loads back with plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qatkit import QatkitError
from qatkit.models import llama


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
    with pytest.raises(QatkitError, match=r"heads: 5 heads of a hidden size of 192 are not of one even width"):
        llama(heads=5, kv_heads=1)
    with pytest.raises(QatkitError, match=r"kv_heads: 6 query heads cannot share 4 equally; write a divisor of 6"):
        llama(kv_heads=4)
