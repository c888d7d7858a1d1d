"""A default ONNX Runtime session runs prepared networks with integers, and computes what training computed."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from qatkit.export.onnx.format import export_onnx
from qatkit.export.onnx.saturation import saturates
from qatkit.export.verification import verify
from qatkit.quantization import calibrate, prepare_for_target
from qatkit.spec import QuantSpec
from tests.quantization.placement.networks import Denoiser, Dense, ResNet, UNet, trained_like

EXPECTED: dict[type[nn.Module], dict[str, int]] = {
    ResNet: {"QLinearConv": 6, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    Dense: {"QLinearConv": 3, "QLinearConcat": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    UNet: {"QLinearConv": 3, "QLinearConcat": 1},
    Denoiser: {"QLinearConv": 2, "Add": 1},  # nothing reads codes of the sum: it is the output
}
FLOAT = {"Conv", "FusedConv", "Add", "Concat", "Gemm", "MatMul", "ReduceMean", "GlobalAveragePool", "Relu"}


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def session(path: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    """A session as users open it; the options below change no result."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_layer_addition_and_concatenation_is_an_integer_kernel_and_exact(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = trained_like(kind())
    x = images()
    float_outputs = model(x)
    prepare_for_target(model, "onnxruntime", x[:2])
    calibrate(model, [x])
    model.eval()
    export_onnx(model, x[:2], tmp_path / "model.onnx")
    runtime = session(tmp_path / "model.onnx", tmp_path / "optimized.onnx")
    kernels = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert {name: kernels[name] for name in EXPECTED[kind]} == EXPECTED[kind]
    assert not (FLOAT & set(kernels)) - set(EXPECTED[kind])

    with torch.no_grad():
        reference = copy.deepcopy(model).double()(x.double())
        error = (model(x) - float_outputs).abs().mean()
    outputs = torch.from_numpy(runtime.run(None, {runtime.get_inputs()[0].name: x.numpy()})[0])
    assert (outputs - reference).abs().mean() <= 0.02 * error


def test_a_quantizer_that_is_reused_after_a_resize_has_one_name_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = images(64)
    model = trained_like(UNet())
    prepare_for_target(model, "onnxruntime", x[:2])
    calibrate(model, [x])
    export_onnx(model.eval(), x[:2], tmp_path / "model.onnx")
    labels = torch.zeros(64, 16, 16, dtype=torch.long)
    result = verify(model, tmp_path / "model.onnx", [(x, labels)], threads=1, task="segmentation")
    assert result.passed, result.failures


@pytest.mark.skipif(not saturates(), reason="this processor multiplies 8-bit codes without overflow")
@pytest.mark.parametrize("bits", [7, 8])
def test_signed_seven_bits_and_unsigned_eight_bits_are_exact_in_a_default_session(bits: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(16, 4, 1, bias=False))
    nn.init.constant_(model[0].weight, 1.0)  # type: ignore[arg-type]
    x = torch.ones(2, 16, 4, 4)
    x[0, 0, 0, 0] = 0.0
    prepare_for_target(model, "onnxruntime", x, weight=QuantSpec(bits))
    calibrate(model, [x])
    export_onnx(model, x, tmp_path / "model.onnx")
    outputs = session(tmp_path / "model.onnx").run(None, {"input": x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(outputs), model(x), atol=0.1)
