"""Every change of an exported OpenVINO model is found by verification, and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qatkit import QuantSpec, Scheme, calibrate
from qatkit.export.openvino.format import export_openvino
from qatkit.export.openvino.runtime import read_model
from qatkit.export.openvino.weights import compare_openvino_weights
from qatkit.export.verification import verify
from qatkit.quantization import prepare_for_target

openvino = pytest.importorskip("openvino")
X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ASYMMETRIC = Scheme(QuantSpec(4, symmetric=False), QuantSpec(8, symmetric=False, strategy="tensor"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A convolution, a layer with zero points, and a layer that is not quantized."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2)
    )
    prepare_for_target(made, "openvino", X, exclude=["6"], layers={"3": ASYMMETRIC})
    calibrate(made, [X])
    return made.eval()


@pytest.fixture(scope="module")
def exported(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openvino") / "model.xml"
    export_openvino(model, X, path, target="openvino")
    return path


def node(read: Any, name: str) -> Any:
    return next(each for each in read.get_ordered_ops() if each.get_friendly_name() == name)


def reader(read: Any, name: str, kind: str) -> Any:
    """The first node of a kind that reads a constant, also through other nodes."""
    (value, *_) = node(read, name).output(0).get_target_inputs() if isinstance(name, str) else ()
    found = value.get_node()
    while found.get_type_name() != kind:
        found = next(iter(found.output(0).get_target_inputs())).get_node()
    return found


def replaced(name: str, change: Callable[[np.ndarray[Any, Any]], None]) -> Callable[[Any], None]:
    def apply(read: Any) -> None:
        old = node(read, name)
        values = old.data.copy()
        change(values)
        new = openvino.opset13.constant(values)
        new.set_friendly_name(name)
        for value in old.output(0).get_target_inputs():
            value.replace_source_output(new.output(0))

    return apply


def bump(values: np.ndarray[Any, Any]) -> None:
    """Change one value as little as its dtype allows."""
    first = values.reshape(-1)[:1]
    first[:] = np.nextafter(first, np.float32(np.inf)) if values.dtype == np.float32 else first + 1


def without_zero_point(read: Any) -> None:
    subtract = reader(read, "3.weight.zero_point", "Subtract")
    codes = subtract.input(0).get_source_output()
    for value in subtract.output(0).get_target_inputs():
        value.replace_source_output(codes)


def with_another_range(read: Any) -> None:
    quantizer = next(each for each in read.get_ordered_ops() if each.get_type_name() == "FakeQuantize")
    high = openvino.opset13.constant(np.float32(quantizer.input(2).get_source_output().get_node().data * 1.01))
    quantizer.input(2).replace_source_output(high.output(0))


def with_scales_of_another_layer(read: Any) -> None:
    multiply = reader(read, "0.input.scale", "Multiply")
    multiply.input(1).replace_source_output(node(read, "1.output.scale").output(0))


def without_bias(read: Any) -> None:
    add = reader(read, "0.bias.scale", "Add")
    (product,) = (
        value for value in add.inputs() if "Convolution" in value.get_source_output().get_node().get_type_name()
    )
    for value in add.output(0).get_target_inputs():
        value.replace_source_output(product.get_source_output())


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "code": (replaced("0.weight.codes", bump), r"layer '0': codes of the weight: 1 of 108 differ, the first at \[0, 0"),
    "scale": (replaced("0.weight.scale", bump), r"layer '0': scales of the weight: 1 of 4 differ"),
    "zero point": (replaced("3.weight.zero_point", bump), r"layer '3': zero points of the weight: 1 of 8 differ"),
    "no zero point": (without_zero_point, r"layer '3': zero points of the weight: not in the file"),
    "bias code": (replaced("0.bias.codes", bump), r"layer '0': the bias: 1 of 4 codes represent a different value"),
    "bias scale": (replaced("0.bias.scale", bump), r"layer '0': the bias's scale .* 1 of 4 differ"),
    "no bias": (without_bias, r"layer '0': the bias: "),
    "input scale": (replaced("0.input.scale", bump), r"layer '0': input: scale: 1 of 1 differ"),
    "input zero point": (replaced("0.input.zero_point", bump), r"layer '0': input: zero point: 1 of 1 differ"),
    "range": (with_another_range, r"layer '0': input: the FakeQuantize node maps the range .* not"),
    "another scale": (with_scales_of_another_layer, r"layer '0': input: scale: not in the file"),
    "plain bias": (replaced("6.bias", bump), r"parameter '6.bias': 1 of 2 differ"),
    "LayerNorm": (replaced("5.weight", bump), r"parameter '5.weight': 1 of 8 differ"),
}


def test_the_file_as_written_has_no_difference(model: nn.Module, exported: Path) -> None:
    compared = compare_openvino_weights(model, read_model(exported))
    assert compared.failures == []
    assert compared.weights == 4 * 27 + 8 * 144


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_file_is_found_and_named(name: str, model: nn.Module, exported: Path, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    read = read_model(exported)
    change(read)
    openvino.save_model(read, tmp_path / "model.xml", compress_to_fp16=False)
    result = verify(model, tmp_path / "model.xml", [(X, torch.zeros(16).long())], threads=1)
    assert not result.passed
    import re

    assert any(re.search(message, failure) for failure in result.failures), result.failures
