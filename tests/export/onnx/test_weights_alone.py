"""Layers with a quantized weight alone compute in a default ONNX Runtime session what training computed."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from qatkit import QuantSpec, prepare_qat
from qatkit.export.onnx.format import export_onnx
from qatkit.export.verification import Verification, verify

SPECS = {
    "int8": QuantSpec(8),
    "int4": QuantSpec(4),
    "uint4": QuantSpec(4, symmetric=False),
    "int8 per tensor": QuantSpec(8, strategy="tensor"),
    "int4 in groups": QuantSpec(4, strategy="group", group_size=32),
}


class Tokens(nn.Module):
    """Linear layers over ``[batch, tokens, 64]``."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(x)))
        return out


def exported(spec: QuantSpec, path: Path) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randn(4, 9, 64)
    prepare_qat(model, spec)
    export_onnx(model, x, path)
    return model, x


def checked(model: nn.Module, x: Tensor, path: Path) -> Verification:
    return verify(model, path, [(x, torch.zeros(4, 9, 32))], task="regression")


@pytest.mark.parametrize("name", SPECS)
def test_products_of_tokens_are_exact_and_codes_take_a_byte(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    result = checked(*exported(SPECS[name], path), path)
    assert result.passed, result.summary()
    assert result.max_error is not None
    assert result.max_error < 1e-6
    codes = [t for t in onnx.load(path).graph.initializer if t.name.endswith("weight.codes")]
    assert {numpy_helper.to_array(tensor).dtype.itemsize for tensor in codes} == {1}


@pytest.mark.parametrize("part", ["codes", "scale", "zero_point"])
def test_a_changed_constant_is_named(part: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model, x = exported(SPECS["uint4"], path)
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if t.name == f"up.weight.{part}")
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = values.flat[0] + 1 if part != "scale" else values.flat[0] * 1.0001
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, path)
    failures = checked(model, x, path).failures
    assert any(failure.startswith("layer 'up': ") and "of the weight: 1 of " in failure for failure in failures), (
        failures
    )


class Gated(nn.Module):
    """Many products and sums of the same values: the number of paths through them doubles with every layer."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for gate in self.gates:
            x = x + x * torch.sigmoid(gate(x))
        return x


def test_a_deep_network_is_compared_in_time(tmp_path: Path) -> None:
    model, x = Gated(24).eval(), torch.randn(2, 3, 8) * 1e-3
    prepare_qat(model, QuantSpec(8))
    export_onnx(model, x, tmp_path / "model.onnx")
    result = verify(model, tmp_path / "model.onnx", [(x, torch.zeros(2, 3, 8))], task="regression")
    assert result.passed, result.summary()
    assert result.layers == 24
