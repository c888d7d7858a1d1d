"""Inputs that MatMulNBits rounds at accuracy level 4, and the targets whose weights have 4 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qatkit import QatkitError, QuantSpec, prepare_qat
from qatkit.export.onnx.format import export_onnx
from qatkit.export.onnx.runtime import integer_kernels, load_runtime
from qatkit.export.verification import verify
from qatkit.quantization import prepare_for_target
from tests.export.onnx.test_packed import Two, checked, exported, grouped, in_float64

ROUNDED = [
    (grouped(4, 32), 32),
    (grouped(4, 64, symmetric=False), 16),
    (QuantSpec(8), 32),
    (grouped(8, 128, symmetric=False), 128),
    (QuantSpec(3, strategy="tensor"), 64),
]


@pytest.mark.parametrize(("weight", "size"), ROUNDED, ids=str)
def test_inputs_are_rounded_as_in_training(weight: QuantSpec, size: int, tmp_path: Path) -> None:
    """Formula of MatMulNBits at accuracy level 4 in float64: absmax / 127 per block of inputs, rounded half to even."""
    torch.manual_seed(0)
    model, x, path = nn.Sequential(nn.Linear(128, 40)).eval(), torch.randn(64, 128), tmp_path / "model.onnx"
    x[0, :32] = 0
    prepare_qat(model, weight, grouped(8, size))
    export_onnx(model, x, path)
    assert integer_kernels(path).integer == {"MatMulNBits": 1}
    blocks = x.numpy().reshape(64, -1, size)
    scale = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127)
    rounded = np.round(blocks / np.where(scale > 0, scale, 1)).astype(np.float64) * scale
    bias = model[0].bias.detach().double().numpy()
    plain = x.double().numpy() @ in_float64(model[0]).T + bias
    expected = rounded.reshape(64, -1) @ in_float64(model[0]).T + bias
    found = load_runtime(path, 1)(x).numpy()
    error = np.abs(expected - plain).mean()  # of rounding the inputs; a value between two codes may change one output
    assert np.abs(found - expected).mean() < 0.01 * error
    assert np.quantile(np.abs(found - expected), 0.9) < 1e-3 * error
    with torch.no_grad():
        assert np.abs(model(x).double().numpy() - expected).mean() < 1e-3 * error
    result = verify(model, path, [(x, torch.zeros(64).long())])
    assert result.passed, result.failures


def test_another_accuracy_level_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model, x = exported(grouped(4, 32), path)
    proto = onnx.load(path)
    level = next(a for node in proto.graph.node for a in node.attribute if a.name == "accuracy_level")
    level.i = 4
    onnx.save(proto, path)
    failures = checked(model, x, path).failures
    assert "layer 'up': its node has accuracy level 4, but it was trained for level 0" in failures


def test_groups_of_inputs_that_are_no_block_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(48, 8))
    prepare_qat(model, QuantSpec(8), grouped(8, 24))
    with pytest.raises(QatkitError, match=r"layer '0': .*strategy: group.*group_size: G}, where G is 16, 32, 64, 128"):
        export_onnx(model, torch.rand(4, 48), tmp_path / "model.onnx")


@pytest.mark.parametrize("target", ["onnxruntime-int4", "onnxruntime-int4-int8"])
def test_targets_quantize_all_linear_layers_in_groups(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, path = Two(96).eval(), torch.randn(36, 96), tmp_path / "model.onnx"
    prepare_for_target(model, target, x)
    export_onnx(model, x, path, target=target)
    kernels = integer_kernels(path)
    assert {**kernels.integer, **kernels.weight_only} == {"MatMulNBits": 2}
    result = checked(model, x, path)
    assert result.passed, result.failures


def test_a_target_that_cannot_hold_is_refused() -> None:
    static = QuantSpec(8, symmetric=False, strategy="tensor")
    with pytest.raises(QatkitError, match=r"activation: target 'onnxruntime-int4' quantizes weights only"):
        prepare_for_target(Two(), "onnxruntime-int4", torch.zeros(2, 96), activation=static)
    with pytest.raises(QatkitError, match=r"'tensor' is not supported .* one scale per group"):
        prepare_for_target(Two(), "onnxruntime-int4-int8", torch.zeros(2, 96), activation=static)
    with pytest.raises(QatkitError, match=r"32 does not divide in_features=88 of layer 'down'"):
        prepare_for_target(Two(88), "onnxruntime-int4", torch.zeros(2, 96))
    with pytest.raises(QatkitError, match=r"'group' is supported only for linear layers, .* layer '0'"):
        prepare_for_target(nn.Sequential(nn.Conv2d(1, 32, 3)), "onnxruntime-int4", torch.zeros(1, 1, 8, 8))
