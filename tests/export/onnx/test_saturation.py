"""`verify` runs a default session: files with which the processor's 8-bit kernels saturate fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from qatkit import QatkitWarning, QuantSpec, calibrate, prepare_qat
from qatkit.export.onnx import format as onnx_format
from qatkit.export.onnx.format import export_onnx
from qatkit.export.onnx.runtime import integer_kernels
from qatkit.export.onnx.saturation import layers_at_risk, saturates
from qatkit.export.verification import Verification, verify
from tests.export.conftest import UINT8

needs_old_kernels = pytest.mark.skipif(not saturates(), reason="this processor's 8-bit kernels are exact")
X = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


def quantized(bits: int, activation: QuantSpec = UINT8) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8))
    with torch.no_grad():
        model[0].weight[:] = model[0].weight.sign() * 0.1  # all of the largest code
    prepare_qat(model, QuantSpec(bits), activation)
    calibrate(model, [X])
    return model.eval()


def checked(model: nn.Module, path: Path) -> Verification:
    return verify(model, path, [(X, torch.zeros(len(X)).long())], threads=1)


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("activation", [UINT8, QuantSpec(8, True, "tensor")], ids=["unsigned", "signed"])
def test_a_plain_session_computes_what_training_computed(bits: int, activation: QuantSpec, tmp_path: Path) -> None:
    import onnxruntime

    model, path = quantized(bits, activation), tmp_path / "model.onnx"
    export_onnx(model, X, path)
    (found,) = onnxruntime.InferenceSession(path).run(None, {"input": X.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(X).numpy(), atol=1e-5)
    assert checked(model, path).passed


def code_types(path: Path) -> set[int]:
    return {tensor.data_type for tensor in onnx.load(path).graph.initializer if tensor.name.endswith("weight.codes")}


@pytest.mark.parametrize("target", ["onnxruntime-vnni", "onnxruntime-arm"])
def test_weights_stay_signed_for_processors_that_add_in_32_bits(target: str, tmp_path: Path) -> None:
    export_onnx(quantized(8), X, tmp_path / "model.onnx", target=target)
    assert code_types(tmp_path / "model.onnx") == {TensorProto.INT8}


@pytest.mark.parametrize("target", [None, "onnxruntime"])
def test_unsigned_weights_keep_integer_kernels_and_a_warning_says_that_they_are_slower(
    target: str | None, tmp_path: Path
) -> None:
    with pytest.warns(QatkitWarning, match=r"layer '0' and 1 more: 8-bit weights .* Use target: onnxruntime"):
        export_onnx(quantized(8), X, tmp_path / "model.onnx", target=target)
    assert code_types(tmp_path / "model.onnx") == {TensorProto.UINT8}
    kernels = integer_kernels(tmp_path / "model.onnx")
    assert (kernels.integer, kernels.floating) == ({"QGemm": 2}, {})


@needs_old_kernels
def test_signed_8_bit_weights_fail_and_the_failure_says_what_to_do(tmp_path: Path) -> None:
    model, path = quantized(8), tmp_path / "model.onnx"
    export_onnx(model, X, path, target="onnxruntime-vnni")
    result = checked(model, path)
    assert not result.passed
    (failure,) = (failure for failure in result.failures if "saturate" in failure)
    assert "signed 8-bit weights of '0', '2' (x86 without VNNI)" in failure
    assert "Train with weight: {num_bits: 7}" in failure


@needs_old_kernels
def test_signed_weights_that_saturate_nowhere_pass(tmp_path: Path) -> None:
    model, path = quantized(8), tmp_path / "model.onnx"
    model[0].input_fake_quant.scale *= 1e3  # type: ignore[union-attr, operator]  # every code is near the zero point
    model[2].input_fake_quant.scale *= 1e3  # type: ignore[union-attr, operator]
    export_onnx(model, X, path, target="onnxruntime-vnni")
    assert not any("saturate" in failure for failure in checked(model, path).failures)


def test_a_processor_with_exact_kernels_runs_the_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = quantized(8), tmp_path / "model.onnx"
    export_onnx(model, X, path, target="onnxruntime-vnni")
    monkeypatch.setattr(onnx_format, "saturates", lambda: False)
    assert not any("saturate" in failure for failure in checked(model, path).failures)


@pytest.mark.parametrize(
    ("codes", "risk"),
    [([[64, -64]], False), ([[64, 65]], True), ([[-128, 0], [0, 0]], False), ([[1], [127]], False), ([[3, 126]], True)],
)
def test_a_pair_of_products_saturates_from_129_on(codes: Any, risk: bool) -> None:
    signed = np.array(codes, np.int8)
    assert layers_at_risk({"layer": signed}) == ["layer"] * risk
    assert layers_at_risk({"layer": signed.view(np.uint8)}) == []
    pair = np.sort(np.abs(signed.astype(int)), axis=1)[:, -2:].sum(axis=1).max()
    assert risk == (255 * pair > 32767)
