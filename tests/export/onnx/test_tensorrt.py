"""Files for TensorRT: signed codes without zero points, and biases in floating point.

TensorRT needs a GPU and is not run here. The form of the graph is what its documentation of explicit quantization
demands; the values are checked in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from qatkit import calibrate, export_model
from qatkit.export.onnx.saturation import saturates
from qatkit.models import cnn, mlp, resnet
from qatkit.quantization import fold_batchnorm, prepare_for_target


@pytest.mark.parametrize(
    "build", [lambda: resnet((8, 16)), lambda: cnn(channels=(8, 16), size=16), lambda: mlp(256, (32,))]
)
def test_all_codes_are_signed_without_zero_points_and_biases_are_floats(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x, path = build().eval(), torch.randn(64, 1, 16, 16), tmp_path / "model.onnx"
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # the exporter removes biases of zeros
            parameter.data.uniform_(-0.1, 0.1)
    fold_batchnorm(model)
    prepare_for_target(model, "tensorrt", x)
    calibrate(model, [x])
    result = export_model(model, "onnx", path, [(x, torch.arange(64) % 10)], target="tensorrt", threads=1)
    assert result.passed or (saturates() and all("saturate" in failure for failure in result.failures))
    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert not [tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.INT32]
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            point = constants[node.input[2]]
            assert point.dtype == "int8"
            assert not point.any()
        if node.op_type in ("Conv", "Gemm"):
            data, weight, bias = node.input
            assert makers[weight].op_type == "DequantizeLinear"
            assert node.op_type == "Gemm" or makers[data].op_type == "DequantizeLinear"
            assert constants[bias].dtype == "float32"
