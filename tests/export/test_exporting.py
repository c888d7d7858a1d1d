"""`export_model`: one call checks, writes, reads back and verifies, in every format."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qatkit
from qatkit import QatkitError, QuantSpec, export_model, prepare_qat, scheme
from qatkit.models import llama


def small() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10))
    prepare_qat(model, weight=QuantSpec(num_bits=4))
    return model, [(torch.rand(16, 64), torch.randint(10, (16,))) for _ in range(2)]


def text() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = llama(vocab_size=300, hidden=32, layers=1, heads=2, kv_heads=1, intermediate=64)
    ids = torch.randint(300, (2, 16))
    return model, [{"input_ids": ids, "labels": ids}]


@pytest.mark.parametrize(("format", "file"), [("dense", "a.safetensors"), ("sparse", "a.safetensors")])
def test_a_model_in_training_is_exported_as_it_predicts_and_goes_on_training(
    format: str, file: str, tmp_path: Path
) -> None:
    model, batches = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = export_model(model, format, tmp_path / "new" / file, iter(batches))
    assert result.passed, result.failures
    assert (result.format, result.samples, result.mean_error) == (format, 32, 0.0)
    assert model.training
    assert model[2].training  # type: ignore[index]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_it_is_public() -> None:
    assert "export_model" in qatkit.__all__


def test_a_transformers_folder_is_written_and_verified(tmp_path: Path) -> None:
    model, batches = text()
    prepare_qat(model, scheme("W8A8").weight, scheme("W8A8").activation, exclude=["lm_head"])
    result = export_model(model, "compressed_tensors", tmp_path / "folder", batches)
    assert result.passed, result.failures
    assert result.metric == "perplexity"


def test_a_gguf_file_is_exported_and_a_difference_is_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = text()
    prepare_qat(model, scheme("Q4_0").weight, exclude=["lm_head"])
    assert export_model(model, "gguf", tmp_path / "model.gguf", batches).passed
    from qatkit.export.gguf import format as gguf

    write = gguf.export_gguf

    def other(model: nn.Module, *arguments: Any) -> None:
        with torch.no_grad():
            kept = model.model.layers[0].mlp.up_proj.weight.clone()  # type: ignore[union-attr,index]
            model.model.layers[0].mlp.up_proj.weight[0] *= -1  # type: ignore[union-attr,index]
            write(model, *arguments)
            model.model.layers[0].mlp.up_proj.weight.copy_(kept)  # type: ignore[union-attr,index]

    monkeypatch.setattr(gguf, "export_gguf", other)
    result = export_model(model, "gguf", tmp_path / "model.gguf", batches)
    assert not result.passed
    assert any("up_proj" in failure or "ffn_up" in failure for failure in result.failures)


def test_mistakes_are_named_before_anything_is_written(tmp_path: Path) -> None:
    model, batches = small()
    for arguments, message in (
        (("onnxx", "a.onnx", batches), "format: unknown export format 'onnxx'; did you mean 'onnx'?"),
        (("dense", "a.onnx", batches), r"does not end in .safetensors, but 'dense' writes a .safetensors file; pass"),
        (("dense", "a.safetensors", []), "batches: there are no batches; pass at least one batch"),
        (("compressed_tensors", "folder", batches), "'compressed_tensors' is supported only for transformers models"),
        (("gguf", "a.gguf", batches), "Sequential"),
    ):
        with pytest.raises(QatkitError, match=message.replace("?", r"\?")):
            export_model(model, arguments[0], tmp_path / arguments[1], arguments[2])
    with pytest.raises(QatkitError, match="target: 'openvino' does not load 'dense' files; use openvino"):
        export_model(model, "dense", tmp_path / "a.safetensors", batches, target="openvino")
    path = tmp_path / "a.safetensors"
    with pytest.raises(QatkitError, match="python: 'dense' files run in the environment of qatkit"):
        export_model(model, "dense", path, batches, python=Path(sys.executable))
    with pytest.raises(QatkitError, match="class_dim: 1 has no effect without a metric"):
        export_model(model, "dense", path, batches, class_dim=1)
    with pytest.raises(QatkitError, match=r"is a folder, but 'dense' writes a \.safetensors file"):
        export_model(model, "dense", tmp_path, batches)
    assert not list(tmp_path.iterdir())
