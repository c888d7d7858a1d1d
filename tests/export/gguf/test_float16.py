"""GGUF's F16: layers whose weights are rounded to float16 in training and stored in float16."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qatkit import QatkitError, apply_ptq, prepare_qat, scheme
from qatkit.export.formats import FORMATS
from qatkit.export.gguf.format import export_gguf
from qatkit.export.verification import verify
from qatkit.models import llama
from qatkit.quantization.mixed.records import stored_bytes
from qatkit.recipe.loading import load_recipe
from qatkit.schemes import Scheme
from tests.export.gguf.test_format import BATCH, loaded, logits, spec, tensors


def small() -> Any:
    torch.manual_seed(0)
    return llama(300, 64, 1, 2, 1, 96, 32, tie_embeddings=False)


def test_f16_rounds_weights_in_training_and_the_file_stores_exactly_these(tmp_path: Path) -> None:
    layers = {"*_proj": scheme("Q4_0"), "model.embed_tokens": scheme("F16"), "lm_head": scheme("F16")}
    model, path = small(), tmp_path / "model.gguf"
    prepare_qat(model, layers=layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = copy.deepcopy(model.lm_head.weight)
    model.train()(**BATCH).loss.backward()
    optimizer.step()
    head = model.eval().lm_head
    assert not torch.equal(head.weight, before)
    assert not torch.equal(head.weight, head.weight.half().float())
    assert torch.equal(head.fake_quantized_weight(), head.weight.half().float())
    export_gguf(model, path)
    found = tensors(path)
    halves = {name for name, tensor in found.items() if tensor.tensor_type.name == "F16"}
    assert halves == {"token_embd.weight", "output.weight"}
    assert np.array_equal(found["output.weight"].data, head.weight.detach().half().numpy())
    assert torch.equal(logits(loaded(path)), logits(model))
    check = verify(model, path, [BATCH])
    assert check.passed, check.failures
    changed = bytearray(path.read_bytes())
    changed[int(found["output.weight"].data_offset) + 6] ^= 1
    path.write_bytes(changed)
    assert any("'lm_head.weight': 1 of 19200 values differ" in each for each in verify(model, path, [BATCH]).failures)


def test_f16_has_no_scale() -> None:
    for name, value in (("strategy", "channel"), ("scale_dtype", "float16")):
        with pytest.raises(QatkitError, match=f"{name}: '{value}' is not supported for type 'float16', which has no"):
            spec("F16", **{name: value})
    with pytest.raises(QatkitError, match=r"'lsq' is not supported for type 'float16'; use unit"):
        spec("F16", observer="lsq")
    assert stored_bytes([4, 32], spec("F16")) == 256


def test_inputs_of_f16_weights_and_formats_without_float16_layers_are_refused() -> None:
    model = small()
    prepare_qat(model, spec("F16"), scheme("Q8_0_A8").activation, exclude=["lm_head"])
    with pytest.raises(QatkitError, match=r"llama\.cpp does not quantize the inputs of F16 weights; remove activation"):
        FORMATS["gguf"].check_model(model)
    model = small()
    prepare_qat(model, spec("F16"), exclude=["lm_head"])
    for name in sorted(set(FORMATS) - {"gguf", "dense", "sparse", "coreml"}):  # coreml refuses the model
        with pytest.raises(QatkitError, match=r"layer '.*proj"):
            FORMATS[name].check_model(model)


@pytest.mark.parametrize("method", ["mse", "importance"])
def test_ptq_leaves_types_without_a_scale_as_they_are(method: str) -> None:
    model = small().eval()
    prepare_qat(model, layers={"*_proj": Scheme(spec("Q4_0", observer="mse")), "lm_head": scheme("F16")})
    before = model.lm_head.weight.clone()
    done = apply_ptq(model, method, [BATCH], lambda batch: model(**batch))
    assert len(done) == 7
    assert "lm_head" not in done
    assert torch.equal(model.lm_head.weight, before)
    override = f"{{scheme: Q4_0, observer: lsq, init: {method}, layers: {{lm_head: {{scheme: F16}}}}}}"
    load_recipe("llm/int4_qat", [f"stages.qat.quantize={override}"])
