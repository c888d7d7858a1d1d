"""Convolutions of every kind, transposed ones and transformers' Conv1D in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qatkit import QuantSpec, calibrate, prepare_qat
from qatkit.export.onnx.format import export_onnx
from qatkit.export.onnx.runtime import integer_kernels
from qatkit.export.verification import Verification, verify
from tests.export.conftest import UINT8
from tests.export.files import change_constant, constants, first_changed
from tests.support.matrix import representatives

SHAPES: dict[type[nn.Module], tuple[int, ...]] = {
    nn.Conv1d: (4, 3, 20), nn.Conv3d: (4, 3, 6, 6, 6), nn.ConvTranspose1d: (4, 3, 9), nn.ConvTranspose2d: (4, 3, 5, 5)
}  # fmt: skip
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
CASES = [
    (kind, weight, activation)
    for kind in SHAPES
    for weight in (QuantSpec(7), QuantSpec(4, symmetric=False, strategy="tensor"), QuantSpec(8))
    for activation in (UINT8, None)
]


def pair(kind: Any, weight: QuantSpec, activation: QuantSpec | None) -> tuple[nn.Module, Tensor]:
    """Two layers, the second in two groups and with a stride, and their input."""
    torch.manual_seed(0)
    extra = {"output_padding": 1} if kind in TRANSPOSED else {}
    model = nn.Sequential(kind(3, 8, 3), nn.ReLU(), kind(8, 6, 3, stride=2, groups=2, **extra), nn.ReLU()).eval()
    x = torch.rand(SHAPES[kind])
    prepare_qat(model, weight, activation)
    if activation is not None:
        calibrate(model, [x])
    return model, x


def checked(model: nn.Module, x: Tensor, path: Path) -> Verification:
    return verify(model, path, [(x, torch.zeros_like(model(x)))], threads=1, task="regression")


@pytest.mark.filterwarnings("ignore:layer '0' and 1 more. 8-bit weights are stored as unsigned")
@pytest.mark.parametrize(("kind", "weight", "activation"), representatives(CASES, {0, 3, 6, 12, 15, 18}))
def test_the_file_computes_what_training_computed(
    kind: type[nn.Module], weight: QuantSpec, activation: QuantSpec | None, tmp_path: Path
) -> None:
    model, x = pair(kind, weight, activation)
    path = tmp_path / "model.onnx"
    export_onnx(model, x, path)
    result = checked(model, torch.cat([x, x[:1]]), path)
    assert result.passed, result.failures
    assert result.max_error is not None
    assert result.max_error < 1e-6 < result.quantization_error
    assert result.weights == sum(p.numel() for p in model.parameters() if p.dim() > 1)
    # the first layer's output is quantized where the second one reads it, that of the second is not
    integer = activation is not None and kind not in TRANSPOSED
    assert integer_kernels(path).integer == ({"QLinearConv": 1} if integer else {})


@pytest.mark.parametrize("kind", TRANSPOSED)
def test_the_scale_of_a_transposed_convolution_belongs_to_its_output(kind: type[nn.Module], tmp_path: Path) -> None:
    model, x = pair(kind, QuantSpec(7), UINT8)
    with torch.no_grad():
        model[2].weight[4:, 1] *= 100.0  # in group 1, output 1: channel 3 + 1
    export_onnx(model, x, tmp_path / "model.onnx")
    file = constants(tmp_path / "model.onnx")
    codes, scale = file["2.weight.codes"], file["2.weight.scale"]
    assert codes.shape[:2] == (6, 4)
    assert scale.argmax() == 4
    weight = model[2].weight.detach().double().numpy()
    for output in range(6):  # torch stores [in, out / groups, ...]
        group, own = divmod(output, 3)
        values = weight[group * 4 : group * 4 + 4, own]
        np.testing.assert_allclose(scale[output], np.abs(values).max() / 63, rtol=1e-6)
        np.testing.assert_allclose(codes[output] * scale[output], values, atol=scale[output] * 0.51)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("weight.codes", "codes of the weight: 1 of"),
        ("weight.scale", "scales of the weight: 1 of 6"),
        ("bias.codes", "the bias: 1"),
    ],
)
def test_a_changed_constant_of_a_transposed_convolution_is_named(part: str, message: str, tmp_path: Path) -> None:
    model, x = pair(nn.ConvTranspose1d, QuantSpec(7), UINT8)
    path = tmp_path / "model.onnx"
    export_onnx(model, x, path)
    change_constant(path, f"2.{part}", first_changed)
    failures = checked(model, x, path).failures
    assert any(failure.startswith(f"layer '2': {message}") for failure in failures), failures


DYNAMIC = QuantSpec(8, symmetric=False, strategy="tensor", dynamic=True)


@pytest.mark.parametrize(
    ("activation", "kernels"),
    [(UINT8, {"MatMulIntegerToFloat": 2}), (DYNAMIC, {"DynamicQuantizeMatMul": 2}), (None, {})],
)
def test_linear_layers_of_gpt2_run_as_other_linear_layers_do(
    activation: QuantSpec | None, kernels: dict[str, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Conv1D(8, 16), nn.GELU(), Conv1D(4, 8)).eval(), torch.rand(4, 5, 16)
    prepare_qat(model, QuantSpec(7), activation)
    calibrate(model, [x])
    export_onnx(model, x, tmp_path / "model.onnx")
    assert constants(tmp_path / "model.onnx")["0.weight.codes"].shape == (8, 16)
    assert checked(model, x, tmp_path / "model.onnx").passed
    assert integer_kernels(tmp_path / "model.onnx").integer == kernels


def test_transposed_convolutions_have_no_integer_kernel_so_8_bit_weights_stay_signed(tmp_path: Path) -> None:
    model, x = pair(nn.ConvTranspose2d, QuantSpec(8), UINT8)
    export_onnx(model, x, tmp_path / "model.onnx")  # without a warning of slow kernels
    assert constants(tmp_path / "model.onnx")["0.weight.codes"].dtype == np.int8


def test_a_bias_of_zeros_that_graph_optimizers_remove_passes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval(), torch.rand(2, 3, 6)
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.bias)
    prepare_qat(model, QuantSpec(8))
    export_onnx(model, x, tmp_path / "model.onnx")
    assert not {"0.bias", "2.bias"} <= constants(tmp_path / "model.onnx").keys()
    assert checked(model, x, tmp_path / "model.onnx").passed
    with torch.no_grad():
        model[2].bias[0] = 1.0
    assert "layer '2': the bias: not in the file" in checked(model, x, tmp_path / "model.onnx").failures
