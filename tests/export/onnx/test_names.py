"""The file of a model has all of its outputs and inputs, whatever they are called and however often they occur."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from qatkit import QatkitError, QatkitWarning, QuantSpec, calibrate, prepare_qat
from qatkit.export.onnx.format import export_onnx
from qatkit.export.onnx.runtime import load_runtime
from qatkit.export.verification import verify
from qatkit.report.bench import bench
from tests.export.conftest import UINT8

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Returning(nn.Module):
    """Passes itself, its input and its layer's output to a function that returns the outputs."""

    def __init__(self, outputs: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.outputs, self.head, self.scale = outputs, nn.Linear(8, 4), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Any:
        return self.outputs(self, x, self.head(x))


OUTPUTS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "one tensor under two names": lambda model, x, y: {"last": y, "states": (x + 1, y), "sum": y + 1},
    "the input": lambda model, x, y: {"y": y, "same": x},
    "a parameter": lambda model, x, y: {"y": y, "bias": model.scale},
    "named as a parameter": lambda model, x, y: {"y": y, "scale": model.scale},
    "computed from the parameter that it is named as": lambda model, x, y: {"y": y, "scale": model.scale.exp()},
    "named as the only output": lambda model, x, y: {"output": y},
    "a list of one": lambda model, x, y: [y],
    "an empty tensor": lambda model, x, y: {"y": y, "none": x[:, :0]},
}


@pytest.mark.parametrize("quantize", [False, True], ids=["plain", "quantized"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_is_in_the_file_under_its_name(name: str, quantize: bool, tmp_path: Path) -> None:
    model = Returning(OUTPUTS[name]).eval()
    if quantize:
        prepare_qat(model, QuantSpec(4), UINT8)
        calibrate(model, [X])
    export_onnx(model, X, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [value.name for value in graph.input] == ["x"]
    with torch.no_grad():
        expected = model(X)
    found = load_runtime(tmp_path / "model.onnx", 1)(X)
    if isinstance(expected, list):
        expected = tuple(expected)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_single_output_in_a_mapping_is_verified(tmp_path: Path) -> None:
    model = Returning(OUTPUTS["named as the only output"])
    export_onnx(model, X, tmp_path / "model.onnx")
    result = verify(
        model,
        tmp_path / "model.onnx",
        [(X, torch.zeros(6, 4))],
        task="regression",
        forward=lambda called, batch: called(batch[0])["output"],
    )
    assert result.passed, result.failures


class Two(nn.Module):
    """Its inputs are named as values of the file could be."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 4)

    def forward(self, q2: Tensor, q0: Tensor) -> dict[str, Tensor]:
        return {"d1": self.head(q0) + q2[:, :4]}


def test_values_between_nodes_do_not_take_the_name_of_an_input_or_output(tmp_path: Path) -> None:
    model, example = Two().eval(), {"q2": X, "q0": X + 1}
    prepare_qat(model, QuantSpec(8), UINT8)
    with torch.no_grad():
        calibrate(model, [example], forward=lambda batch: model(**batch))
        expected = model(**example)
    export_onnx(model, example, tmp_path / "model.onnx")
    found = load_runtime(tmp_path / "model.onnx", 1)(**example)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


class Product(nn.Module):
    """Its input has the name of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 4))

    def forward(self, weight: Tensor) -> Tensor:
        return weight @ self.weight


def test_an_input_may_have_the_name_of_a_parameter(tmp_path: Path) -> None:
    model = Product()
    export_onnx(model, X, tmp_path / "model.onnx")
    with torch.no_grad():
        assert torch.allclose(load_runtime(tmp_path / "model.onnx", 1)(weight=X), model(X), atol=1e-6)


class Scaled(nn.Module):
    """Takes a number and a table besides its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, factor: Tensor, table: Tensor, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.head(x + y) * factor + table.mean()
        return out


def test_the_batch_is_the_most_frequent_size_and_a_warning_names_the_others(tmp_path: Path) -> None:
    model, factor, table = Scaled(), torch.tensor(2.0), torch.randn(9, 3)
    with pytest.warns(QatkitWarning, match=r"^the batch of the example is 6, so the first .* of 'table' \(9\)") as seen:
        export_onnx(model, (factor, table, X, X), tmp_path / "model.onnx")
    assert [warning.filename for warning in seen] == [__file__]
    with torch.no_grad():
        expected = model(factor, table, X[:2], X[:2])
    found = load_runtime(tmp_path / "model.onnx", 1)(factor, table, X[:2], X[:2])
    assert torch.allclose(found, expected, atol=1e-6)


class Pair(nn.Module):
    """Two texts of different lengths, and features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 4), nn.Linear(5, 4)

    def forward(self, first: Tensor, second: Tensor, features: Tensor) -> Tensor:
        out: Tensor = self.embed(first).mean(1) + self.embed(second).mean(1) + self.head(features)
        return out


def test_texts_of_different_lengths_have_dimensions_of_their_own(tmp_path: Path) -> None:
    model = Pair()
    example = {"first": torch.ones(3, 7).long(), "second": torch.ones(3, 9).long(), "features": torch.randn(3, 5)}
    export_onnx(model, example, tmp_path / "model.onnx")
    dims = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in onnx.load(tmp_path / "model.onnx").graph.input
    }
    assert dims == {"first": ["batch", "sequence"], "second": ["batch", "second_sequence"], "features": ["batch", 5]}
    other = {"first": torch.ones(2, 11).long(), "second": torch.ones(2, 4).long(), "features": torch.randn(2, 5)}
    with torch.no_grad():
        assert torch.allclose(load_runtime(tmp_path / "model.onnx", 1)(**other), model(**other), atol=1e-6)


def test_forward_may_read_the_dtype_device_and_shape_of_a_quantized_weight(tmp_path: Path) -> None:
    def converted(model: Any, x: Tensor, y: Tensor) -> Tensor:
        weight = model.head.weight
        out: Tensor = model.head(x[:, : weight.shape[1]].to(weight.device, weight.dtype))
        return out

    model = Returning(converted).eval()
    prepare_qat(model, QuantSpec(4), UINT8)
    calibrate(model, [X])
    export_onnx(model, X, tmp_path / "model.onnx")
    with torch.no_grad():
        assert torch.allclose(load_runtime(tmp_path / "model.onnx", 1)(X), model(X), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (Returning(lambda model, x, y: 3), X, "the model returned int, which contains no tensor; return a tensor"),
        (
            Returning(lambda model, x, y: y),
            torch.randn(6, 9),
            r"the model fails on the example: RuntimeError: mat1 .*\(6x9 and 8x4\); pass the inputs of one call",
        ),
        (
            Returning(lambda model, x, y: x @ model.head.weight.T),
            X,
            "the model fails on the example: .*; if `forward` computes with the weight .*, exclude that layer",
        ),
        (
            Returning(lambda model, x, y: y),
            X[0],
            r"dynamic batch size: Found the following conflicts .*: - Received user",
        ),
        (Scaled(), (torch.tensor(1.0),) * 4, "factor, table, x, y of the example has no dimensions, but the first"),
    ],
    ids=["no tensor", "wrong shape", "weight", "no batch", "no dimension"],
)
def test_a_model_that_the_file_cannot_hold_is_refused_with_its_reason(
    model: nn.Module, example: Any, message: str, tmp_path: Path
) -> None:
    if "weight" in message:
        prepare_qat(model, QuantSpec(4))
    with pytest.raises(QatkitError, match=message):
        export_onnx(model, example, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X.double(), r"ONNX Runtime fails on these inputs: .*Actual: \(tensor\(double\)\) , expected: \(tensor\(float"),
        (X[:, :7], "ONNX Runtime fails on these inputs: (.|\n)*Got: 7 Expected: 8"),
        (X.bfloat16(), "ONNX Runtime fails on these inputs: .*BFloat16.*; pass tensors with the dtypes and sizes"),
    ],
    ids=["dtype", "size", "bfloat16"],
)
def test_inputs_that_the_file_does_not_take_are_one_error(x: Tensor, message: str, tmp_path: Path) -> None:
    export_onnx(nn.Linear(8, 4), X, tmp_path / "model.onnx")
    with pytest.raises(QatkitError, match=message):
        load_runtime(tmp_path / "model.onnx", 1)(x)


def test_the_latency_of_a_model_with_a_number_and_a_table_is_measured(tmp_path: Path) -> None:
    example = {"factor": torch.tensor(2.0), "table": torch.randn(9, 3), "x": X, "y": X}
    with pytest.warns(QatkitWarning, match="'table'"):
        export_onnx(Scaled(), example, tmp_path / "model.onnx")
    assert [row["batch_size"] for row in bench(tmp_path / "model.onnx", example, repeats=1)] == [1, 64]
