"""ONNX files that are too large for one protobuf message: their tensors are in a side file."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from qatkit import QatkitError, QuantSpec, prepare_qat
from qatkit.export.formats import FORMATS
from qatkit.export.onnx import external as onnx_external
from qatkit.export.onnx.format import export_onnx
from qatkit.export.onnx.runtime import integer_kernels, load_runtime
from qatkit.export.verification import Verification, verify

X = torch.rand(4, 64)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a file in which no more than 10 kB of tensors fit."""
    monkeypatch.setattr(onnx_external, "LIMIT", 10_000)
    return tmp_path / "model.onnx"


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 3)).eval()
    prepare_qat(model, QuantSpec(8))
    return model


def checked(model: nn.Module, path: Path) -> Verification:
    return verify(model, path, [(X, torch.zeros(4).long())], threads=1)


def names(path: Path) -> list[str]:
    return sorted(each.name for each in path.parent.iterdir())


def outputs(path: Path) -> Tensor:
    out: Tensor = load_runtime(path, 1)(X)
    return out


def test_large_tensors_are_in_a_side_file_that_the_runtime_and_verification_read(path: Path) -> None:
    model = network()
    export_onnx(model, X, path)
    (side,) = FORMATS["onnx"].files_beside(path)
    assert names(path) == sorted(["model.onnx", side.name])
    assert side.stat().st_size >= 64 * 256
    assert path.stat().st_size < 10_000
    assert FORMATS["onnx"].size(path) == path.stat().st_size + side.stat().st_size
    result = checked(model, path)
    assert result.passed, result.failures
    assert result.weights == 64 * 256 + 256 * 3
    assert integer_kernels(path).floating
    onnx.checker.check_model(str(path))  # and by path, as other tools read it


def test_a_small_model_has_no_side_file(path: Path) -> None:
    export_onnx(nn.Linear(64, 3), X, path)
    assert names(path) == ["model.onnx"]


def test_an_export_removes_the_side_file_of_the_one_that_it_replaces(path: Path) -> None:
    export_onnx(network(), X, path)
    first = names(path)
    (path.parent / "other.12345678.onnx.data").write_bytes(b"of another model")
    export_onnx(network(seed=1), X, path)
    assert len(names(path)) == 3
    assert first[0] not in names(path)
    export_onnx(nn.Linear(64, 3), X, path)
    assert names(path) == ["model.onnx", "other.12345678.onnx.data"]


def test_an_export_that_fails_between_the_two_files_leaves_the_old_model(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_onnx(network(), X, path)
    before = outputs(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*model\.onnx'"):
        export_onnx(network(seed=1), X, path)
    assert torch.equal(outputs(path), before)
    assert checked(network(), path).passed


def test_a_changed_and_a_missing_side_file_fail_verification(path: Path) -> None:
    model = network()
    export_onnx(model, X, path)
    (side,) = FORMATS["onnx"].files_beside(path)
    content = bytearray(side.read_bytes())
    content[-1] ^= 1
    side.write_bytes(bytes(content))
    assert checked(model, path).failures[0] == f"{side.name}: the content has changed since the export"
    side.unlink()
    result = checked(model, path)
    assert result.failures[0] == f"{side.name}: the file with the tensors of model.onnx is missing"
    assert any("ONNX Runtime cannot load it" in failure for failure in result.failures)
    with pytest.raises(QatkitError, match="ONNX Runtime cannot load it"):
        load_runtime(path)
