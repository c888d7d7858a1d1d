"""compressed-tensors folders with 8-bit scales (MX formats, NVFP4) or zero points, in plain transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qatkit import QatkitError, QuantSpec, scheme
from qatkit.export.compressed.format import export_compressed
from qatkit.export.formats import FORMATS
from qatkit.export.verification import verify
from qatkit.schemes import Scheme
from tests.export.compressed.test_format import BATCH, logits, model_with, specs

TOKEN = scheme("W8A8").activation


GROUP = QuantSpec(4, symmetric=False, strategy="group", group_size=32, observer="lsq_plus")
BFLOAT16 = {
    "MXFP4A16": "mxfp4-pack-quantized",
    "MXFP4": "mxfp4-pack-quantized",
    "MXFP6A16": "mxfp6-pack-quantized",
    "MXFP6A8": "mxfp6-pack-quantized",
    "MXFP8A16": "mxfp8-quantized",
    "MXFP8": "mxfp8-quantized",
    "NVFP4A16": "nvfp4-pack-quantized",
}
CASES = {
    **{name: (scheme(name), form, torch.bfloat16) for name, form in BFLOAT16.items()},
    "NVFP4A16, learned": (specs("NVFP4A16", observer="lsq"), "nvfp4-pack-quantized", torch.bfloat16),
    "W4AFP8": (scheme("W4AFP8"), "int-quantized", torch.float32),
    "W8A8, zero points": (Scheme(QuantSpec(8, symmetric=False), TOKEN), "int-quantized", torch.float32),
    "W4A8, zero points": (Scheme(GROUP, TOKEN), "int-quantized", torch.float32),
}
IN_DEFAULT_SUITE = ("MXFP4", "MXFP8", "NVFP4A16", "W4A8, zero points")


@pytest.mark.parametrize(
    ("quantize", "form", "dtype"),
    [
        pytest.param(*case, id=name, marks=[] if name in IN_DEFAULT_SUITE else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
def test_plain_transformers_gives_the_trained_logits_to_the_last_bit(
    quantize: Scheme, form: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = model_with(quantize, dtype, steps=1, layers=1, heads=2, kv_heads=1)
    export_compressed(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(logits(loaded), logits(model))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["format"] == form
    check = verify(model, tmp_path / "out", [BATCH])
    assert check.passed, check.failures
    assert (check.layers, check.mean_error) == (7, 0.0)


def test_the_output_layer_is_quantized_if_it_is_not_tied(tmp_path: Path) -> None:
    model = model_with({"*_proj": specs("W4A16", size=32), "lm_head": scheme("W8A16")}, layers=1, heads=2, kv_heads=1)
    export_compressed(model, tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    assert verify(model, tmp_path, [BATCH]).passed


def flipped(value: Tensor) -> Tensor:
    value.flatten().view(torch.uint8)[0] ^= 1
    return value


@pytest.mark.parametrize(
    ("quantize", "key", "message"),
    [
        (scheme("MXFP4A16"), "weight_packed", "weight': 1 of .* codes differ"),
        (scheme("MXFP6A16"), "weight_packed", "weight': 1 of .* codes differ"),
        (scheme("MXFP8A16"), "weight_scale", "weight_scale': 1 of .* scales differ"),
        (scheme("NVFP4A16"), "weight_scale", "weight_scale': 1 of .* scales differ"),
        (scheme("NVFP4A16"), "weight_global_scale", "weight_global_scale': 1 of 1 scales differ"),
        (Scheme(QuantSpec(8, symmetric=False), TOKEN), "weight_zero_point", "zero_point': 1 of .* zero points differ"),
    ],
    ids=["mxfp4", "mxfp6", "mxfp8", "nvfp4", "nvfp4-tensor", "zero-point"],
)
def test_one_changed_bit_is_named(quantize: Scheme, key: str, message: str, tmp_path: Path) -> None:
    dtype = torch.float32 if key == "weight_zero_point" else torch.bfloat16
    model = model_with(quantize, dtype, steps=0, layers=1, heads=2, kv_heads=1)
    export_compressed(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.0.mlp.up_proj.{key}"
    tensors[name] = flipped(tensors[name])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    failures = verify(model, tmp_path, [BATCH]).failures
    assert any(re.search(message, failure) for failure in failures), failures


@pytest.mark.parametrize(
    ("quantize", "dtype", "message"),
    [
        (scheme("MXFP4"), torch.float32, "to bfloat16, but the model is in float32; use a bfloat16 model"),
        (scheme("NVFP4"), torch.bfloat16, "input scales of NVFP4 in bfloat16.*set scheme: NVFP4A16 or MXFP4"),
        (specs("MXFP4A16", size=64), torch.bfloat16, "4-bit float weights only as NVFP4, MXFP4.*set scheme: NVFP4A16"),
        (scheme("NVFP4_UE4M3"), torch.bfloat16, "4-bit float weights only as NVFP4, MXFP4"),
        (Scheme(QuantSpec(8, type="float_e5m2")), torch.bfloat16, "does not store float_e5m2 weights"),
        (scheme("MXFP4XFP8"), torch.bfloat16, "divides fp8 inputs by their scales in bfloat16"),
        (specs("W4A16_ASYM"), torch.float32, "packed zero points of weight-only quantization"),
    ],
    ids=["float32", "nvfp4-inputs", "group", "ue4m3", "e5m2", "fp8-inputs", "packed"],
)
def test_what_transformers_cannot_compute_is_refused(
    quantize: Scheme, dtype: torch.dtype, message: str, tmp_path: Path
) -> None:
    model = model_with(quantize, dtype, steps=0, layers=1, heads=2, kv_heads=1)
    with pytest.raises(QatkitError, match=message):
        FORMATS["compressed_tensors"].check_model(model)
