"""Dense files hold the weights that training computed with, and verification finds any other value."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qatkit.export.dense as dense
from qatkit import QatkitError, QuantSpec, prepare_qat
from qatkit.export.dense import export_dense
from tests.export.conftest import Images, Quantized, checked


def test_dense_weights_are_the_quantized_ones_and_give_the_same_outputs(
    quantized: Quantized, images: Images, tmp_path: Path
) -> None:
    model, path = quantized(weight=QuantSpec(3), activation=None), tmp_path / "model.safetensors"
    export_dense(model, path)
    result = checked(model, path, images)
    assert result.passed, result.failures
    assert (result.format, result.layers, result.max_error, result.allowed_error) == ("dense", 4, 0.0, 0.0)
    weight = load_file(path)["conv1.weight"]
    assert max(len(channel.unique()) for channel in weight) <= 8, "3 bits are at most 8 values"


def test_a_dense_file_says_that_it_does_not_quantize_activations(
    quantized: Quantized, images: Images, tmp_path: Path
) -> None:
    model, path = quantized(), tmp_path / "model.safetensors"
    export_dense(model, path)
    result = checked(model, path, images)
    assert result.passed, result.failures
    assert result.allowed_error is None
    assert result.mean_error is not None
    assert result.mean_error > 0
    assert "does not quantize activations" in result.summary()


@pytest.mark.parametrize("key", ["conv2.weight", "conv2.bias"])
def test_a_changed_dense_value_fails(key: str, quantized: Quantized, images: Images, tmp_path: Path) -> None:
    model, path = quantized(), tmp_path / "model.safetensors"
    export_dense(model, path)
    tensors = load_file(path)
    tensors[key].view(-1)[11] += 1e-3
    save_file(tensors, path)
    failures = checked(model, path, images).failures
    assert any(failure.startswith(f"'{key}': 1 of") for failure in failures), failures


def test_a_dense_file_without_a_layer_fails(quantized: Quantized, images: Images, tmp_path: Path) -> None:
    model, path = quantized(), tmp_path / "model.safetensors"
    export_dense(model, path)
    tensors = load_file(path)
    del tensors["conv2.weight"]
    save_file(tensors, path)
    result = checked(model, path, images)
    assert "conv2.weight" in result.failures[0]
    assert result.mean_error is None


def test_tied_dense_weights_are_written_once_per_name_and_refused_where_they_would_differ(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        model[2].weight = model[0].weight
        return model

    both, one = tied(), tied()
    prepare_qat(both, QuantSpec(4))
    export_dense(both, tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["0.weight"], tensors["2.weight"])
    plain = tied()
    plain.load_state_dict(tensors)
    assert torch.equal(plain[0].weight, both[0].fake_quantized_weight())
    prepare_qat(one, QuantSpec(4), include=["2"])
    with pytest.raises(QatkitError, match=r"'0.weight' and '2.weight' share one tied weight"):
        export_dense(one, tmp_path / "one.safetensors")
    assert not (tmp_path / "one.safetensors").exists()


def test_a_write_that_breaks_off_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_text("old")

    def breaks_off(tensors: object, path: Path, metadata: object) -> None:
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(dense, "save_file", breaks_off)
    with pytest.raises(OSError, match="disk full"):
        export_dense(nn.Linear(8, 8), tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_text() == "old"


def test_bfloat16_weights_stay_bfloat16_in_a_dense_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    prepare_qat(model, QuantSpec(4))
    export_dense(model, tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["0.weight"].dtype == torch.bfloat16
    assert torch.equal(tensors["0.weight"], model[0].fake_quantized_weight())
