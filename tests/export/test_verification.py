"""Verification passes exported files and fails changed ones, naming the difference and its place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from qatkit import QatkitError, QuantSpec, calibrate, prepare_qat
from qatkit.export.onnx.format import export_onnx
from qatkit.export.verification import verify
from tests.export.conftest import UINT8, Images, Quantized, batches, checked

LAYER = "conv2"


@pytest.mark.parametrize(
    ("weight", "rounds_inputs"),
    [(QuantSpec(8), True), (QuantSpec(4), True), (QuantSpec(2, symmetric=False), True), (QuantSpec(4), False)],
)
def test_what_was_exported_passes(
    weight: QuantSpec, rounds_inputs: bool, quantized: Quantized, images: Images, tmp_path: Path
) -> None:
    model = quantized(weight=weight) if rounds_inputs else quantized(weight=weight, activation=None)
    export_onnx(model, images[0][:2], tmp_path / "model.onnx")
    result = checked(model, tmp_path / "model.onnx", images)
    assert result.passed, result.failures
    assert (result.layers, result.samples) == (4, len(images[0]))
    assert result.weights == sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert result.mean_error is not None
    assert result.allowed_error is not None
    assert result.mean_error <= result.allowed_error <= 0.01 * max(result.quantization_error, 1)
    assert result.agreement == 1.0
    assert result.trained_metric == result.runtime_metric
    with torch.no_grad():
        right = (model(images[0]).argmax(1) == images[1]).float().mean().item()
    assert result.trained_metric == pytest.approx(right)
    assert json.loads(json.dumps(asdict(result)))["text"] == result.summary()


def test_a_plain_model_passes(trained: nn.Module, images: Images, tmp_path: Path) -> None:
    export_onnx(trained, images[0][:2], tmp_path / "model.onnx")
    result = checked(trained, tmp_path / "model.onnx", images)
    assert result.passed, result.failures
    assert (result.layers, result.quantization_error) == (0, 0.0)


@pytest.fixture(scope="module")
def original(quantized: Quantized, images: Images, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, bytes]:
    """A model in training mode, and the bytes of its file."""
    path = tmp_path_factory.mktemp("original") / "model.onnx"
    model = quantized(weight=QuantSpec(4))
    export_onnx(model, images[0][:2], path)
    return model, path.read_bytes()


Tamper = Callable[[Any], None]


def constant(graph: Any, name: str, change: Callable[[np.ndarray[Any, Any]], None]) -> None:
    """Change one constant of a graph in place."""
    (tensor,) = (tensor for tensor in graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def weight_decoder(graph: Any) -> Any:
    (node,) = (node for node in graph.node if f"{LAYER}.weight.codes" in node.input)
    return node


def one_code(graph: Any) -> None:
    def change(values: np.ndarray[Any, Any]) -> None:
        values[3, 2, 1, 0] += 1 if values[3, 2, 1, 0] < 7 else -1

    constant(graph, f"{LAYER}.weight.codes", change)


def one_scale(graph: Any) -> None:
    def change(values: np.ndarray[Any, Any]) -> None:
        values[5] = np.nextafter(values[5], np.float32(1))

    constant(graph, f"{LAYER}.weight.scale", change)


def one_zero_point(graph: Any) -> None:
    def change(values: np.ndarray[Any, Any]) -> None:
        values[5] = 1

    constant(graph, f"{LAYER}.weight.zero_point", change)


def one_bias(graph: Any) -> None:
    def change(values: np.ndarray[Any, Any]) -> None:
        values[7] += 1

    constant(graph, f"{LAYER}.bias.codes", change)


def bias_scale(graph: Any) -> None:
    def change(values: np.ndarray[Any, Any]) -> None:
        values[7] *= 1.5

    constant(graph, f"{LAYER}.bias.scale", change)


def input_scale(graph: Any) -> None:
    def change(values: np.ndarray[Any, Any]) -> None:
        values *= np.float32(1.5)

    constant(graph, f"{LAYER}.input.scale", change)


def input_zero_point(graph: Any) -> None:
    def change(values: np.ndarray[Any, Any]) -> None:
        values += np.uint8(1)

    constant(graph, f"{LAYER}.input.zero_point", change)


def other_codes_are_decoded(graph: Any) -> None:
    """The codes stay in the file, and the graph reads a copy in which one differs."""
    (tensor,) = (tensor for tensor in graph.initializer if tensor.name == f"{LAYER}.weight.codes")
    graph.initializer.add().CopyFrom(tensor)
    graph.initializer[-1].name = "copy"
    for node in graph.node:
        node.input[:] = ["copy" if name == tensor.name else name for name in node.input]


def decoded_along_another_axis(graph: Any) -> None:
    weight_decoder(graph).attribute[0].i = 1


def layer_in_floating_point(graph: Any) -> None:
    """The codes of a layer are gone; the layer computes with float weights."""
    decoder = weight_decoder(graph)
    codes, scale = (
        numpy_helper.to_array(next(t for t in graph.initializer if t.name == name)) for name in decoder.input[:2]
    )
    weight = codes.astype(np.float32) * scale.reshape(-1, 1, 1, 1)
    graph.initializer.append(numpy_helper.from_array(weight, decoder.output[0]))
    graph.node.remove(decoder)
    for tensor in [t for t in graph.initializer if t.name == f"{LAYER}.weight.codes"]:
        graph.initializer.remove(tensor)


def input_is_not_rounded(graph: Any) -> None:
    (encoder,) = (n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[1] == f"{LAYER}.input.scale")
    (decoder,) = (n for n in graph.node if encoder.output[0] in n.input)
    for node in graph.node:
        node.input[:] = [encoder.input[0] if name == decoder.output[0] else name for name in node.input]
    graph.node.remove(encoder)
    graph.node.remove(decoder)


def relu_is_gone(graph: Any) -> None:
    """No constant differs; only running the file shows it."""
    relu = next(node for node in graph.node if node.op_type == "Relu")
    relu.op_type = "Neg"


def constant_is_gone(graph: Any) -> None:
    for tensor in [t for t in graph.initializer if t.name == f"{LAYER}.weight.scale"]:
        graph.initializer.remove(tensor)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (
            one_code,
            r"layer 'conv2': codes of the weight: 1 of 4608 differ, the first at \[3, 2, 1, 0\]: .* in the file",
        ),
        (one_code, r"layer 'conv2': weights as the runtime decodes them: 1 of 4608 differ"),
        (one_scale, r"layer 'conv2': scales of the weight: 1 of 32 differ, the first at \[5, 0\]"),
        (one_zero_point, r"layer 'conv2': zero points of the weight: 1 of 32 differ"),
        (one_bias, r"layer 'conv2': the bias: 1 of 32 codes represent a different value, the first at \[7\]"),
        (bias_scale, r"layer 'conv2': the bias's scale \(weight scale x input scale\): 1 of 32 differ"),
        (input_scale, r"layer 'conv2': input: scale: 1 of 1 differ"),
        (input_zero_point, r"layer 'conv2': input: zero point: 1 of 1 differ"),
        (other_codes_are_decoded, r"layer 'conv2': no node decodes the codes"),
        (decoded_along_another_axis, r"layer 'conv2': .*(decode|differ)"),
        (layer_in_floating_point, r"layer 'conv2': codes of the weight: not in the file"),
        (input_is_not_rounded, r"layer 'conv2': input: no QuantizeLinear node uses its scale"),
        (
            relu_is_gone,
            r"outputs: the mean difference from the trained model is .*, but the bound \(.*\) is ",
        ),
        (constant_is_gone, r"layer 'conv2': scales of the weight: not in the file"),
        (constant_is_gone, r"ONNX Runtime cannot load it"),
    ],
)
def test_a_file_that_was_changed_fails_and_the_change_is_named(
    tamper: Tamper, message: str, original: tuple[nn.Module, bytes], images: Images, tmp_path: Path
) -> None:
    model, content = original
    proto = onnx.load_from_string(content)
    tamper(proto.graph)
    onnx.save(proto, tmp_path / "model.onnx")
    result = checked(model, tmp_path / "model.onnx", images)
    assert not result.passed
    assert any(re.search(message, failure) for failure in result.failures), result.failures
    assert result.summary().startswith("FAILED: ")
    json.dumps(asdict(result), allow_nan=False)


def test_a_changed_float_bias_fails(quantized: Quantized, images: Images, tmp_path: Path) -> None:
    model, path = quantized(activation=None), tmp_path / "model.onnx"
    export_onnx(model, images[0][:2], path)
    proto = onnx.load(path)

    def change(values: np.ndarray[Any, Any]) -> None:
        values[7] += 1e-6

    constant(proto.graph, f"{LAYER}.bias", change)
    onnx.save(proto, path)
    (failure,) = checked(model, path, images).failures
    assert failure.startswith("layer 'conv2': the bias: 1 of 32 differ, the first at [7]")


def test_accuracy_and_agreement_are_measured_in_the_runtime(
    original: tuple[nn.Module, bytes], images: Images, tmp_path: Path
) -> None:
    model, content = original
    proto = onnx.load_from_string(content)
    relu_is_gone(proto.graph)
    onnx.save(proto, tmp_path / "model.onnx")
    result = checked(model, tmp_path / "model.onnx", images)
    assert result.trained_metric > 0.9
    assert result.runtime_metric is not None
    assert result.runtime_metric < 0.5
    assert result.agreement is not None
    assert result.agreement < 0.5


def test_a_dead_channel_may_have_another_scale_in_the_file(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(16, 4)), torch.rand(64, 16)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 2.0
    prepare_qat(model, QuantSpec(observer="lsq"), UINT8)
    with torch.no_grad():
        model[0].weight_fake_quant.scale[1] = 1e-30
    calibrate(model, [x])
    export_onnx(model, x, tmp_path / "model.onnx")
    scales = next(t for t in onnx.load(tmp_path / "model.onnx").graph.initializer if t.name == "0.weight.scale")
    assert numpy_helper.to_array(scales)[1] > 1e-20
    result = verify(model, tmp_path / "model.onnx", [(x, torch.zeros(64).long())], threads=1)
    assert result.passed, result.failures


def with_a_renamed_bias() -> tuple[nn.Module, torch.Tensor]:
    """A convolution whose bias is added after it, in a constant that the exporter's optimizer names."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), torch.randn(8, 4, 6, 6)
    with torch.no_grad():
        model[0].weight[1] *= 1e-8
        model[0].bias[1] = 0.1
    prepare_qat(model, QuantSpec(8), UINT8)
    calibrate(model, [x])
    return model, x


@pytest.mark.filterwarnings("ignore:layer '0'. the bias is too large")
def test_a_constant_is_found_whatever_the_optimizer_called_it(tmp_path: Path) -> None:
    model, x = with_a_renamed_bias()
    export_onnx(model, x, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    assert "0.bias" not in {tensor.name for tensor in proto.graph.initializer}
    result = verify(model, tmp_path / "model.onnx", [(x, torch.zeros(8).long())], threads=1)
    assert result.passed, result.failures
    (name,) = (tensor.name for tensor in proto.graph.initializer if list(tensor.dims) == [4, 1, 1])

    def change(values: np.ndarray[Any, Any]) -> None:
        values[2] += 1e-6

    constant(proto.graph, name, change)
    onnx.save(proto, tmp_path / "model.onnx")
    (failure,) = verify(model, tmp_path / "model.onnx", [(x, torch.zeros(8).long())], threads=1).failures
    assert failure.startswith("layer '0': the bias: 1 of 4 differ, the first at [2]")


def test_a_layer_that_is_called_twice_passes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 12), torch.randn(8, 12)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(12, 3))
    prepare_qat(model, QuantSpec(8), UINT8)
    calibrate(model, [x])
    export_onnx(model, x, tmp_path / "model.onnx")
    result = verify(model, tmp_path / "model.onnx", [(x, torch.zeros(8).long())], threads=1)
    assert result.passed, result.failures


def test_the_file_of_another_model_fails(quantized: Quantized, images: Images, tmp_path: Path) -> None:
    export_onnx(quantized(weight=QuantSpec(4)), images[0][:2], tmp_path / "model.onnx")
    failures = checked(quantized(weight=QuantSpec(3)), tmp_path / "model.onnx", images).failures
    assert sum("codes of the weight" in failure for failure in failures) == 4


def test_a_layer_that_only_the_file_quantizes_fails(
    quantized: Quantized, trained: nn.Module, images: Images, tmp_path: Path
) -> None:
    export_onnx(quantized(weight=QuantSpec(8)), images[0][:2], tmp_path / "model.onnx")
    failures = checked(trained, tmp_path / "model.onnx", images).failures
    assert any("'conv1.weight.codes' is in the file, but the model has no such quantized layer" in f for f in failures)


def test_a_broken_file_fails(quantized: Quantized, images: Images, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff not a model")
    result = checked(quantized(), tmp_path / "model.onnx", images)
    assert not result.passed
    assert result.runtime_metric is None


def test_four_bit_activations_pass_because_training_rounds_biases_as_the_runtime_does(
    quantized: Quantized, images: Images, tmp_path: Path
) -> None:
    model = quantized(weight=QuantSpec(8), activation=QuantSpec(4, symmetric=False, strategy="tensor"))
    export_onnx(model, images[0][:2], tmp_path / "model.onnx")
    assert checked(model, tmp_path / "model.onnx", images).passed


def test_verification_needs_a_batch_a_known_file_type_and_a_file(
    trained: nn.Module, images: Images, tmp_path: Path
) -> None:
    export_onnx(trained, images[0][:2], tmp_path / "model.onnx")
    with pytest.raises(QatkitError, match="no batch"):
        verify(trained, tmp_path / "model.onnx", [])
    with pytest.raises(QatkitError, match=r"no export format writes '\.h5' files"):
        verify(trained, tmp_path / "model.h5", batches(images))
    with pytest.raises(QatkitError, match="there is no such file or folder; export the model first"):
        verify(trained, tmp_path / "other.onnx", batches(images))


def test_the_model_is_left_as_it_was(original: tuple[nn.Module, bytes], images: Images, tmp_path: Path) -> None:
    model, content = original
    (tmp_path / "model.onnx").write_bytes(content)
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    checked(model, tmp_path / "model.onnx", images)
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
