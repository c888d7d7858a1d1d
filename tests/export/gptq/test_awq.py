"""Folders in AWQ's layout: the converter of compressed-tensors and gptqmodel read the trained codes and scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from safetensors.torch import load_file, save_file
from torch import nn

from qatkit import QatkitError, QuantSpec, export_model, prepare_qat
from qatkit.export.formats import FORMATS, format_of_path
from qatkit.export.gptq.format import export_packed
from qatkit.export.verification import verify
from qatkit.quantization.prepare import qat_layers
from tests.export.gptq.test_gptq import LAYER, PYTHON, batches, name_of, needs_gptqmodel, plain, qwen, small, spec

SPECS = [spec(), spec(group=None), spec(symmetric=False), spec(4, False, 64, scale_rule="minimum")]


@pytest.mark.parametrize("weight", SPECS, ids=name_of)
def test_every_supported_spec_is_stored_exactly(weight: QuantSpec, tmp_path: Path) -> None:
    result = export_model(small(weight), "awq", tmp_path / "awq", batches())
    assert result.passed, result.failures
    assert (result.mean_error, result.not_run) == (0.0, "gptqmodel")
    assert format_of_path(tmp_path / "awq").name == "awq"


@pytest.mark.parametrize("weight", [spec(), spec(symmetric=False)], ids=name_of)
def test_the_converter_of_compressed_tensors_reads_the_same_weights(weight: QuantSpec, tmp_path: Path) -> None:
    model = small(weight)
    export_packed(model, tmp_path / "awq", "awq")
    converter = AutoAWQConverter.from_autoawq_config(
        json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    )
    found = converter.process(load_file(tmp_path / "awq" / "model.safetensors"))
    for name, layer in qat_layers(model):
        shape = torch.Size(found[f"{name}.weight_shape"].tolist())
        codes = unpack_from_int32(found[f"{name}.weight_packed"], 4, shape).float()
        scales = found[f"{name}.weight_scale"].float()
        packed = found[f"{name}.weight_zero_point"]
        zeros = unpack_from_int32(packed, 4, scales.shape, packed_dim=0).float()
        values = (codes - zeros.repeat_interleave(32, 1)) * scales.repeat_interleave(32, 1)
        assert torch.equal(values, layer.fake_quantized_weight())


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_one_changed_value_is_found_and_named(part: str, tmp_path: Path) -> None:
    model, file = small(), tmp_path / "awq" / "model.safetensors"
    export_packed(model, tmp_path / "awq", "awq")
    tensors = load_file(file)
    tensors[f"{LAYER}.{part}"].view(torch.int16 if part == "scales" else torch.int32)[1, 1] += 1
    save_file(tensors, file)
    failures = verify(model, tmp_path / "awq", batches()).failures
    assert f"'{LAYER}.{part}': 1 of" in failures[0]


def test_single_layers_may_be_excluded_but_not_mistaken(tmp_path: Path) -> None:
    model = qwen()
    prepare_qat(model, spec(), exclude=["lm_head", LAYER])
    result = export_model(model, "awq", tmp_path / "awq", batches())
    assert result.passed, result.failures
    config = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == [LAYER, "lm_head"]
    mistaken: Any = plain()
    mistaken.model.layers[0].mlp.up_proj_more = nn.Linear(64, 64)
    prepare_qat(mistaken, spec(), exclude=["lm_head", "*up_proj"])
    with pytest.raises(QatkitError, match=r"'model\.layers\.0\.mlp\.up_proj' is not quantized, and its name is a part"):
        FORMATS["awq"].check_model(mistaken)


def test_other_bit_widths_are_refused() -> None:
    with pytest.raises(QatkitError, match=r"'awq' does not support num_bits: 8; set weight: \{num_bits: 4\}"):
        FORMATS["awq"].check_model(small(spec(8)))


@pytest.mark.slow
@needs_gptqmodel
@pytest.mark.parametrize("weight", SPECS[1:], ids=name_of)
def test_gptqmodel_decodes_the_trained_weights_and_multiplies_in_float16(weight: QuantSpec, tmp_path: Path) -> None:
    model = qwen()
    prepare_qat(model, weight, exclude=["lm_head", LAYER])
    result = export_model(model, "awq", tmp_path / "awq", batches(), python=Path(PYTHON or ""))
    assert result.passed, result.failures
    assert result.not_run == ""
