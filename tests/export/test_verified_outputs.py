"""`verify` bounds every output of a model, of any type, and says what it could not measure."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchmetrics
from onnx import numpy_helper
from torch import Tensor, nn

from qatkit import QatkitError, QuantSpec, calibrate, prepare_qat
from qatkit.export.interface import Measured
from qatkit.export.onnx.format import bound, export_onnx
from qatkit.export.onnx.weights import compare_onnx_weights
from qatkit.export.verification import Verification, verify
from tests.export.conftest import UINT8

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class Called(torchmetrics.Metric):
    """Takes any outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("batches", torch.tensor(0), "sum")

    def update(self, outputs: Any, labels: Any) -> None:
        self.batches += 1

    def compute(self) -> Tensor:
        return self.batches


class Heads(nn.Module):
    """A body, and a head from which a function computes the outputs."""

    def __init__(self, outputs: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.outputs, self.body, self.head = outputs, nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        return self.outputs(x, self.head(self.body(x).relu()))


def large_and_small(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"large": 1e4 * x, "small": y}


def numbers_and_indices(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"indices": torch.arange(30000), "small": y}


def exported(model: nn.Module, path: Path, quantize: bool = False) -> nn.Module:
    model.eval()
    if quantize:
        prepare_qat(model, QuantSpec(4), UINT8)
        calibrate(model, [X])
    export_onnx(model, X, path)
    return model


def checked(model: nn.Module, path: Path) -> Verification:
    return verify(model, path, [(X, None)], forward=lambda called, batch: called(batch[0]), metric=Called())


def changed(path: Path, change: Callable[[Any], None]) -> None:
    proto = onnx.load(path)
    change(proto.graph)
    onnx.save(proto, path)


def scaled(name: str, factor: float) -> Callable[[Any], None]:
    def change(graph: Any) -> None:
        (tensor,) = (tensor for tensor in graph.initializer if tensor.name == name)
        values = numpy_helper.to_array(tensor) * np.float32(factor)
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return change


def doubled(output: str) -> Callable[[Any], None]:
    """Adds an output to itself, so that no constant differs."""

    def change(graph: Any) -> None:
        maker = next(node for node in graph.node if output in node.output)
        maker.output[:] = ["half" if name == output else name for name in maker.output]
        graph.node.append(onnx.helper.make_node("Add", ["half", "half"], [output]))

    return change


@pytest.mark.parametrize("outputs", [large_and_small, numbers_and_indices])
def test_a_wrong_output_beside_large_values_fails_and_is_named(outputs: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = exported(Heads(outputs), path)
    assert checked(model, path).passed
    changed(path, doubled("small"))
    (failure,) = checked(model, path).failures
    assert failure.startswith("outputs: the mean difference of 'small' from the trained model is ")


@pytest.mark.parametrize("quantize", [False, True], ids=["plain", "quantized"])
@pytest.mark.parametrize(
    "outputs",
    [
        lambda x, y: {"y": y, "mask": y > 0},
        lambda x, y: {"y": y, "best": y.argmax(1)},
        lambda x, y: y.masked_fill(x[:, :4] > 1, -torch.inf),
        lambda x, y: {"y": y, "same": x, "zero": 0 * x},
        lambda x, y: (y, x[:, :0]),
    ],
    ids=["booleans", "classes", "infinities", "not quantized", "empty"],
)
def test_outputs_of_any_kind_pass_and_fail_if_they_are_wrong(quantize: bool, outputs: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = exported(Heads(outputs), path, quantize)
    result = checked(model, path)
    assert result.passed, result.failures
    assert result.allowed_error is not None
    assert 0 <= result.allowed_error < 0.1
    changed(path, lambda graph: [setattr(node, "op_type", "Neg") for node in graph.node if node.op_type == "Relu"])
    assert not checked(model, path).passed


def test_infinities_in_other_places_fail(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    exported(Heads(lambda x, y: y.masked_fill(x[:, :4] > 1, -torch.inf)), path)
    other = Heads(lambda x, y: y.masked_fill(x[:, :4] > 1.1, -torch.inf)).eval()
    (failure,) = checked(other, path).failures
    assert "the mean difference from the trained model is inf, but the bound (1e-4 of the mean output) is " in failure


class OnlyFloat32(Heads):
    def forward(self, x: Tensor) -> Any:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return super().forward(x)


def test_a_model_that_fails_in_float64_is_verified_and_a_failure_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = exported(OnlyFloat32(lambda x, y: y), path, quantize=True)
    result = checked(model, path)
    assert result.passed, result.failures
    changed(path, doubled("output"))
    (failure,) = checked(model, path).failures
    assert failure.endswith(
        "; the effect of rounding is unknown, because the model fails in float64: TypeError: float32 only)"
    )
    changed(path, doubled("output"))
    assert "float64" not in checked(exported(Heads(lambda x, y: y), tmp_path / "other.onnx"), path).failures[0]


def test_a_renamed_input_fails(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = exported(Heads(lambda x, y: y), path)

    def rename(graph: Any) -> None:
        graph.input[0].name = "other"
        for node in graph.node:
            node.input[:] = ["other" if name == "x" else name for name in node.input]

    changed(path, rename)
    assert checked(model, path).failures == ["input 'other': Heads.forward has no parameter with this name"]


@pytest.mark.parametrize("name", ["body.weight", "head.bias"])
def test_a_parameter_that_is_not_quantized_is_compared_by_its_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = exported(Heads(lambda x, y: y), path)
    changed(path, scaled(name, 1 + 1e-6))  # too little for the outputs
    (failure,) = checked(model, path).failures
    assert re.match(rf"parameter '{name}': \d+ of \d+ differ, the first at ", failure)


def test_a_batchnorm_that_the_exporter_folds_passes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    model(X + 1)
    assert checked(exported(model, tmp_path / "model.onnx"), tmp_path / "model.onnx").passed


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "3.bias"])
def test_parameters_are_compared_next_to_a_folded_batchnorm(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 6, 1), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(6, 3))
    x = X[..., None]
    model(x + 1)
    path = tmp_path / "model.onnx"
    export_onnx(model.eval(), x, path)
    assert verify(model, path, [(x, torch.zeros(len(x), 3))], task="regression").passed
    changed(path, scaled(name, 1 + 1e-4))
    assert f"parameter '{name}'" in str(compare_onnx_weights(model, path).failures)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_batchnorm_after_a_transposed_convolution_passes(groups: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose1d(8, 6, 1, groups=groups), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(6, 3))
    x, path = X[..., None], tmp_path / "model.onnx"
    model(x + 1)
    export_onnx(model.eval(), x, path)
    assert verify(model, path, [(x, torch.zeros(len(x), 3))], task="regression").failures == []


def test_a_batchnorm_that_is_folded_in_half_precision_passes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 6, 1), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(6, 3))
    model(X[..., None] + 1)
    model, x, path = model.half().eval(), X[..., None].half(), tmp_path / "model.onnx"
    export_onnx(model, x, path)
    assert compare_onnx_weights(model, path).failures == []


def test_a_constant_that_the_model_adds_after_a_bias_of_zeros_is_not_the_bias(tmp_path: Path) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.shift = nn.Linear(8, 3), nn.Parameter(torch.rand(3))
            nn.init.zeros_(self.body.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.body(x) + 2 * self.shift
            return out

    model, path = Shifted().eval(), tmp_path / "model.onnx"
    prepare_qat(model, QuantSpec(8))
    export_onnx(model, X, path)
    result = verify(model, path, [(X, torch.zeros(len(X), 3))], task="regression")
    assert result.passed, result.failures


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_verified_in_onnx_runtime_or_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype).eval()
    x, path = X.to(dtype), tmp_path / "model.onnx"
    if dtype == torch.bfloat16:
        with pytest.raises(QatkitError, match=r"layer '1': ONNX Runtime has no bfloat16 kernel for Linear .*half\(\)"):
            export_onnx(model, x, path)
        return
    export_onnx(model, x, path)
    result = verify(model, path, [(x, torch.zeros(len(x), 3))], task="regression")
    assert result.passed, result.failures
    changed(path, scaled("1.bias", 2))
    assert not verify(model, path, [(x, torch.zeros(len(x), 3))], task="regression").passed


def measured(**numbers: Any) -> Measured:
    return Measured(**{"quantizes_inputs": True, "half_precision": False, "mean_output": 1.0, **numbers})


@pytest.mark.parametrize(
    ("numbers", "text", "limit"),
    [
        ({"quantization_error": 0.5, "quantizes_inputs": False}, "1e-4 of the mean output", 1e-4),
        ({"quantization_error": 0.0}, "1e-4 of the mean output", 1e-4),
        ({"quantization_error": 0.5}, "1% of the quantization error", 5e-3),
        ({"quantization_error": 1e-9}, "1% of the quantization error", 1e-6),
        ({"quantization_error": 0.5, "rounding_error": 0.01}, "twice the effect of float32 rounding", 0.02),
        ({"quantization_error": 0.5, "rounding_error": 1.0}, "twice the effect of float32 rounding", 0.25),
        ({"quantization_error": 0.5, "rounding_error": 1.0, "whole": True}, "1% of the values", 0.01),
        ({"quantization_error": 0.0, "whole": True}, "1e-4 of the mean output", 1e-4),
    ],
)
def test_the_bound_of_an_output(numbers: dict[str, Any], text: str, limit: float) -> None:
    found = bound(measured(**numbers))
    assert found.text == text
    assert found.limit == pytest.approx(limit)
