"""LiteRT files hold the trained codes and scales, and every changed one is found; LiteRT itself runs in test_litert."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qatkit import QatkitError, QuantSpec, calibrate, export_model, prepare_qat
from qatkit.export.formats import FORMATS
from qatkit.export.litert.content import Content, Grid, decode, encode
from qatkit.export.litert.format import export_litert
from qatkit.export.verification import verify
from qatkit.quantization import prepare_for_target
from qatkit.quantization.placement.points import placement_of
from tests.cli.in_process import qatkit
from tests.test_docs import ROOT, write_named_blocks

A8 = QuantSpec(8, symmetric=False, strategy="tensor")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    return layers.eval()


X = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 0.5
BATCHES = [(X, torch.zeros(8).long())]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = network()
    prepare_for_target(model, "litert", X)
    calibrate(model, [X])
    path = tmp_path_factory.mktemp("litert") / "model.tflite"
    export_litert(model, X, path)
    return model, path


def content_of(exported: tuple[nn.Module, Path]) -> Content:
    return decode(exported[1].read_bytes())


def test_the_target_quantizes_the_outputs_of_linear_layers(exported: tuple[nn.Module, Path]) -> None:
    points = placement_of(exported[0]).points
    assert [(point.module, point.part, point.readers) for point in points] == [
        ("1", "output", ("4",)), ("4", "output", ())
    ]  # fmt: skip


def test_the_file_is_verified_and_says_that_litert_did_not_run(exported: tuple[nn.Module, Path]) -> None:
    model, path = exported
    result = verify(model, path, BATCHES)
    assert result.passed, result.failures
    assert (result.mean_error, result.weights, result.layers) == (0.0, 4 * 9 + 16 * 3, 2)
    assert (result.runtime, result.not_run) == ("PyTorch, with the weights of the LiteRT file,", "LiteRT")


def test_integer_layers_read_and_write_codes(exported: tuple[nn.Module, Path]) -> None:
    content = content_of(exported)
    kinds = [
        (each.code, [content.tensors[index].dtype for index in (*each.inputs, *each.outputs)])
        for each in content.operators
        if each.code in (3, 9)
    ]
    assert kinds == [(3, ["int8", "int8", "int32", "int8"]), (9, ["int8", "int8", "int32", "int8"])]
    assert content.tensors[content.inputs["input"]].shape == (-1, 1, 4, 4)
    assert content.tensors[content.outputs[""]].shape == (-1, 3)


def test_the_codes_are_the_formula(exported: tuple[nn.Module, Path]) -> None:
    weight = exported[0].get_submodule("0").weight.detach().double()
    scale = (weight.abs().flatten(1).amax(1) / 127).float()
    tensor = next(each for each in content_of(exported).tensors if each.name == "0.weight")
    assert tensor.values is not None
    assert tensor.grid is not None
    assert np.array_equal(tensor.grid.scales, scale.numpy())
    codes = (weight / scale.double().view(-1, 1, 1, 1)).round()
    assert np.array_equal(tensor.values, codes.permute(0, 2, 3, 1).numpy())


def changed_codes(values: np.ndarray[Any, Any], grid: Grid) -> tuple[np.ndarray[Any, Any], Grid]:
    values = values.copy()
    values.reshape(-1)[5 % values.size] += 1
    return values, grid


def swapped_rows(values: np.ndarray[Any, Any], grid: Grid) -> tuple[np.ndarray[Any, Any], Grid]:
    return values[::-1], grid


def changed_scale(values: Any, grid: Grid) -> tuple[Any, Grid]:
    scales = grid.scales.copy()
    scales[-1] = np.nextafter(scales[-1], np.float32(1))
    return values, replace(grid, scales=scales)


def changed_zero_point(values: Any, grid: Grid) -> tuple[Any, Grid]:
    return values, replace(grid, zero_points=grid.zero_points + 1)


def other_axis(values: Any, grid: Grid) -> tuple[Any, Grid]:
    return values, replace(grid, axis=1)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("0.weight", changed_codes, "layer '0': codes of the weight: 1 of 36 differ"),
        ("4.weight", swapped_rows, "layer '4': codes of the weight: "),
        ("0.weight", changed_scale, "layer '0': scales of the weight: 1 of 4 differ, the first at [3]"),
        ("4.weight", changed_zero_point, "layer '4': zero points of the weight: 3 of 3 differ"),
        ("4.weight", other_axis, "layer '4': scales of the weight: dimension 1 in the file, not 0"),
        ("0.bias", changed_codes, "layer '0': the bias: 1 of 4 codes represent a different value"),
        ("4.bias", changed_scale, "layer '4': the bias's scale (weight scale x input scale): 1 of 3 differ"),
        ("0.input", changed_scale, "layer '0': input: scale: 1 of 1 differ"),
        ("1.output", changed_zero_point, "result '1.output': zero point: 1 of 1 differ"),
        ("1.output#2", changed_scale, "result '1.output': scale: 1 of 1 differ"),
        ("4.output", changed_zero_point, "result '4.output': zero point: 1 of 1 differ"),
    ],
)
def test_every_changed_value_is_found_and_named(
    name: str,
    change: Callable[[Any, Any], tuple[Any, Grid]],
    said: str,
    exported: tuple[nn.Module, Path],
    tmp_path: Path,
) -> None:
    content = content_of(exported)
    index = next(index for index, each in enumerate(content.tensors) if each.name == name)
    values, grid = change(content.tensors[index].values, content.tensors[index].grid)
    content.tensors[index] = replace(content.tensors[index], values=values, grid=grid)
    path = tmp_path / "model.tflite"
    path.write_bytes(encode(content))
    result = verify(exported[0], path, BATCHES)
    assert not result.passed
    assert said in "\n".join(result.failures)


def test_a_quantizer_that_the_model_does_not_have_is_found(exported: tuple[nn.Module, Path], tmp_path: Path) -> None:
    content = content_of(exported)
    index = next(index for index, each in enumerate(content.tensors) if each.name == "1.output")
    content.tensors[index] = replace(content.tensors[index], name="2.output")
    path = tmp_path / "model.tflite"
    path.write_bytes(encode(content))
    assert "'2.output': the model has no such quantizer" in verify(exported[0], path, BATCHES).failures


def test_a_damaged_file_fails_with_a_reason(exported: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, path = exported
    data = path.read_bytes()
    broken = tmp_path / "model.tflite"
    for size in (0, 6, 40, len(data) // 2, len(data) - 200):
        broken.write_bytes(data[:size])
        (failure,) = verify(model, broken, BATCHES).failures
        assert failure.startswith("model.tflite cannot be read: ")


def test_an_interpreter_without_litert_is_named(exported: tuple[nn.Module, Path]) -> None:
    with pytest.raises(QatkitError, match=r"--python: cannot import ai-edge-litert: .*`qatkit environment litert`"):
        verify(*exported, BATCHES, python=Path(sys.executable))


@pytest.mark.parametrize(
    ("weight", "activation", "said"),
    [
        (QuantSpec(8, symmetric=False), A8, "weights are symmetric integers; set weight: {num_bits: 8}"),
        (
            QuantSpec(4, strategy="group", group_size=4),
            None,
            "no weight scales per group; set weight.strategy: channel",
        ),
        (QuantSpec(8, observer="lsq"), A8, "observer: lsq and scale_rule: qmax also give -128; set weight: {observer"),
        (QuantSpec(8, scale_rule="range"), None, "observer: minmax and scale_rule: range also give -128"),
        (QuantSpec(8), QuantSpec(8, strategy="token"), "inputs of 8 bits with one calibrated scale; set activation: "),
        (QuantSpec(8), QuantSpec(4, symmetric=False, strategy="tensor"), "inputs of 8 bits with one calibrated scale"),
    ],
)
def test_other_quantization_is_refused_by_the_name_of_the_layer(
    weight: QuantSpec, activation: QuantSpec | None, said: str
) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    prepare_qat(model, weight, activation)
    with pytest.raises(QatkitError, match="layer '0': LiteRT's") as error:
        FORMATS["litert"].check_model(model)
    assert said in str(error.value)


@pytest.mark.medium
def test_the_interpreter_of_a_recipe_must_exist_before_training(tmp_path: Path) -> None:
    write_named_blocks(ROOT / "docs" / "litert.md", tmp_path)
    done = qatkit("validate", "phone.yaml", "export.python=litert-env/bin/python", cwd=tmp_path)
    assert done.code == 2
    assert "export.python: 'litert-env/bin/python' is not a file; pass the interpreter of an environment" in done.err


def test_layers_that_cannot_be_converted_are_refused_before_training() -> None:
    for layer in (nn.LayerNorm(8), nn.LSTM(8, 8), nn.Conv1d(8, 8, 1), nn.Embedding(8, 8)):
        with pytest.raises(QatkitError, match=rf"layer '1': LiteRT export does not support {type(layer).__name__}"):
            FORMATS["litert"].check_model(nn.Sequential(nn.Linear(8, 8), layer))
    convolution = nn.Sequential(nn.Conv1d(8, 8, 1))
    prepare_qat(convolution, QuantSpec(8))
    with pytest.raises(QatkitError, match="layer '0': LiteRT export does not support a quantized Conv1d; exclude it"):
        FORMATS["litert"].check_model(convolution)
    FORMATS["litert"].check_model(nn.Sequential(nn.Sequential(), nn.Linear(8, 8)))


class Sorted(nn.Module):
    """A model whose operation is not a layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(x, 1)


def test_an_operation_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    with pytest.raises(QatkitError, match=r"LiteRT export does not support the operation CumSum"):
        export_model(Sorted(), "litert", tmp_path / "model.tflite", [(torch.rand(4, 8), torch.zeros(4).long())])
    assert not (tmp_path / "model.tflite").exists()
