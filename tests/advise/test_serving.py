"""Predicted serving memory equals the weights of an exported folder and the key-value cache of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qatkit import QatkitError, QuantSpec, prepare_qat, scheme
from qatkit.advise.serving import serving_memory, weight_bytes
from qatkit.export.compressed.format import export_compressed
from qatkit.models import llama

SHAPE = {"hidden": 256, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 384, "context": 64}


@pytest.mark.parametrize("name", ["W4A16", "W8A16", "W2A16", "FP8_DYNAMIC"])
def test_weights_take_what_the_exported_tensors_take(name: str, tmp_path: Path) -> None:
    plain = llama(300, **SHAPE)
    model = type(plain)._from_config(plain.config, dtype=torch.bfloat16)
    weight = scheme(name).weight
    assert weight is not None
    prepare_qat(model, QuantSpec(**{**weight.__dict__, "scale_dtype": "bfloat16"}), exclude=["lm_head"])
    export_compressed(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    found = sum(t.numel() * t.element_size() for key, t in tensors.items() if not key.endswith("weight_shape"))
    with torch.device("meta"):
        assert weight_bytes(llama(300, **SHAPE), name) == found


def test_keys_and_values_take_what_transformers_caches() -> None:
    model = llama(300, **SHAPE).bfloat16()
    with torch.no_grad():
        cache = model(torch.zeros(3, 20, dtype=torch.long), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    found = {row.scheme: row for row in serving_memory(model, context=20, batch=3)}
    assert found["BF16"].cache == held
    assert found["W4A16"].total < found["W8A8"].total < found["BF16"].total
    assert serving_memory(model, 20, 3, kv_bits=8)[0].cache == held // 2


def test_a_model_that_does_not_say_what_it_caches_is_refused() -> None:
    with pytest.raises(QatkitError, match="no config with the number of layers and heads"):
        serving_memory(nn.Linear(4, 4), 16, 1)
