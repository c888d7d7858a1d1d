"""Exported ONNX files in ONNX Runtime: exact integers, integer kernels, and refusals with advice."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from qatkit import QatkitError, QatkitWarning, QuantSpec, calibrate, prepare_qat
from qatkit.export.onnx.format import export_onnx
from qatkit.export.onnx.runtime import integer_kernels, load_runtime
from tests.export.conftest import UINT8, Quantized
from tests.support.matrix import representatives

WEIGHTS = [
    QuantSpec(bits, symmetric=symmetric, strategy=strategy)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for strategy in ("tensor", "channel")
]


def _spec_name(spec: QuantSpec) -> str:
    return f"{spec.num_bits}-{'s' if spec.symmetric else 'a'}-{spec.strategy}"


def exported(model: nn.Module, x: Tensor, folder: Path) -> Path:
    path = folder / "model.onnx"
    export_onnx(model, x, path)
    return path


def constants(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def error(model: nn.Module, path: Path, x: Tensor) -> float:
    """Mean difference of outputs, as a fraction of the mean output."""
    with torch.no_grad():
        expected = model.eval()(x)
    return float((load_runtime(path, 1)(x) - expected).abs().mean() / expected.abs().mean())


def two_layers(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 8, bias=bias), nn.ReLU(), nn.Linear(8, 4, bias=bias))


def test_every_product_of_the_int8_cnn_runs_on_integer_kernels(
    quantized: Quantized, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    kernels = integer_kernels(exported(quantized(), images[0][:1], tmp_path))
    assert kernels.integer == {"QLinearConv": 3, "QGemm": 1}
    assert kernels.floating == {}


def test_a_plain_model_runs_on_floating_point_kernels_and_gives_the_same(
    trained: nn.Module, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    path = exported(trained, images[0][:1], tmp_path)
    kernels = integer_kernels(path)
    assert kernels.integer == {}
    assert sum(kernels.floating.values()) == 4
    assert error(trained, path, images[0]) < 1e-5


@pytest.mark.parametrize("spec", representatives(WEIGHTS, {1, 10, 13}), ids=_spec_name)
def test_codes_scales_and_outputs_are_the_trained_ones(
    spec: QuantSpec, quantized: Quantized, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    model = quantized(weight=spec)
    path = exported(model, images[0][:2], tmp_path)
    file, plain = constants(path), dict(model.named_parameters())
    layers = [name.removesuffix(".weight") for name in plain if name.endswith(".weight")]
    assert len(layers) == 4
    for name in layers:  # numpy's own clip and round, in the definition's words
        weight = plain[f"{name}.weight"].detach().numpy()
        shape = [-1] + [1] * (weight.ndim - 1) if spec.strategy == "channel" else []
        scale, zero = (file[f"{name}.weight.{part}"].reshape(shape) for part in ("scale", "zero_point"))
        low, high = (0, 255) if spec.num_bits == 8 else (spec.qmin, spec.qmax)
        codes = np.clip(np.round(weight / scale) + zero.astype(np.float32), low, high)
        signed = spec.symmetric and spec.num_bits < 8  # signed 8-bit weights saturate some processors' kernels
        assert file[f"{name}.weight.codes"].dtype == (np.int8 if signed else np.uint8)
        assert (file[f"{name}.weight.codes"] == codes).all()
        step = scale.reshape(-1) * file[f"{name}.input.scale"]
        assert (file[f"{name}.bias.scale"] == step.reshape(file[f"{name}.bias.scale"].shape)).all()
        assert (file[f"{name}.bias.codes"] == np.round(plain[f"{name}.bias"].detach().numpy() / step)).all()
    assert integer_kernels(path).floating == {}
    assert error(model, path, images[0]) < 1e-3


@pytest.mark.parametrize("activation", [QuantSpec(4, False, "tensor"), QuantSpec(5, True, "tensor")])
def test_activations_of_fewer_bits_are_clipped_to_their_range(
    activation: QuantSpec, quantized: Quantized, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    model = quantized(activation=activation)
    path = exported(model, images[0][:2], tmp_path)
    assert error(model, path, images[0]) < 1e-4
    assert error(model, path, images[0] * 3) < 1e-3, "values beyond the calibrated range"
    if not activation.symmetric:
        assert integer_kernels(path).floating == {}


def test_groups_of_weights_are_exact(tmp_path: Path) -> None:
    model, x = two_layers(), torch.randn(32, 16)
    prepare_qat(model, QuantSpec(4, strategy="group", group_size=4), UINT8)
    calibrate(model, [x])
    path = exported(model, x, tmp_path)
    assert constants(path)["0.weight.scale"].shape == (8, 4)
    assert error(model, path, x) < 1e-6


def test_weight_only_layers_keep_their_float_bias_and_inputs(
    quantized: Quantized, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    model = quantized(activation=None)
    path = exported(model, images[0][:2], tmp_path)
    assert error(model, path, images[0]) < 1e-5
    assert not [name for name in constants(path) if ".input." in name or name.endswith("bias.codes")]


def test_sequences_run_on_integer_kernels_too(tmp_path: Path) -> None:
    model, x = two_layers(), torch.randn(8, 5, 16)
    prepare_qat(model, QuantSpec(), UINT8)
    calibrate(model, [x])
    path = exported(model, x, tmp_path)
    assert integer_kernels(path).integer == {"MatMulIntegerToFloat": 2}
    assert error(model, path, x) < 1e-3


@pytest.mark.parametrize("index", [0, 2])
def test_a_dead_channel_with_a_tiny_scale_and_a_bias_does_not_overflow(index: int, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), torch.rand(16, 1, 8, 8)
    with torch.no_grad():
        model[index].weight[1], model[index].bias[1] = 0, 2.0
    prepare_qat(model, QuantSpec(observer="lsq"), UINT8)
    with torch.no_grad():
        model[index].weight_fake_quant.scale[1] = 1e-30
    calibrate(model, [x])
    path = exported(model, x, tmp_path)
    file = constants(path)
    assert file[f"{index}.bias.codes"].dtype == np.int32
    assert (file[f"{index}.weight.codes"][1] == file[f"{index}.weight.zero_point"][1]).all()
    np.testing.assert_allclose(file[f"{index}.bias.codes"][1] * file[f"{index}.bias.scale"][1], 2.0, rtol=1e-6)
    assert integer_kernels(path).integer["QLinearConv"] == 1
    assert error(model, path, x) < 1e-3


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_bias_too_large_for_32_bits_stays_exact_and_is_named_in_a_warning(kind: str, tmp_path: Path) -> None:
    # ONNX Runtime rounds a float bias inside such a layer to int32 by itself and lets it overflow
    if kind == "conv":
        model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), torch.rand(16, 1, 8, 8)
    else:
        model, x = two_layers(), torch.rand(16, 16)
    with torch.no_grad():
        model[0].weight[1] *= 1e-13
        model[0].bias[1] = 2.0
    prepare_qat(model, QuantSpec(num_bits=7), UINT8)
    calibrate(model, [x])
    with pytest.warns(QatkitWarning, match=r"layer .0.: the bias is too large .*channel 1: bias 2\)") as seen:
        path = exported(model, x, tmp_path)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert error(model, path, x) < 1e-3


def test_a_bias_that_fits_alone_but_not_beside_the_sum_it_is_added_to_is_not_written_as_int32(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(16, 4)), torch.rand(8, 16)
    prepare_qat(model, QuantSpec(), UINT8)
    calibrate(model, [x])
    layer = model[0]
    step = layer.weight_fake_quant.qparams(layer.weight)[0][0] * layer.input_fake_quant.scale
    with torch.no_grad():
        layer.bias[0] = step.item() * (2**31 - 2**12)
    with pytest.warns(QatkitWarning, match="too large"):
        path = exported(model, x, tmp_path)
    assert "0.bias" in constants(path)
    assert error(model, path, x) < 1e-6


def test_the_batch_is_dynamic_even_when_the_example_has_one_sample(
    quantized: Quantized, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    model = quantized()
    runtime = load_runtime(exported(model, images[0][:1], tmp_path), 1)
    for size in (1, 2, 7):
        assert runtime(images[0][:size]).shape == (size, 10)


def test_the_model_is_left_as_it_was(quantized: Quantized, images: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    model = quantized().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    layout, gradients = str(model), [p.requires_grad for p in model.parameters()]
    exported(model, images[0][:2], tmp_path)
    assert str(model) == layout
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_tied_layers_and_a_layer_used_twice_keep_their_meaning(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.again = self.a
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.again(self.b(self.a(x).relu()).relu())
            return y

    model, x = Twice(), torch.rand(16, 8)
    prepare_qat(model, QuantSpec(4), UINT8)
    calibrate(model, [x])
    path = exported(model, x, tmp_path)
    assert {"a.weight.codes", "b.weight.codes"} <= set(constants(path))
    assert error(model, path, x) < 1e-3


def test_a_model_that_is_one_layer_exports(tmp_path: Path) -> None:
    model, x = nn.Linear(8, 4), torch.rand(16, 8)
    prepare_qat(nn.Sequential(model), QuantSpec(), UINT8)
    calibrate(model, [x])
    path = exported(model, x, tmp_path)
    assert "weight.codes" in constants(path)
    assert error(model, path, x) < 1e-3


def test_nothing_is_printed_logged_or_warned(tmp_path: Path) -> None:
    script = (
        "import torch; from pathlib import Path; from qatkit.export.onnx.format import export_onnx;"
        "from qatkit.export.onnx.runtime import integer_kernels; path = Path('model.onnx');"
        "export_onnx(torch.nn.Linear(8, 4), torch.rand(2, 8), path); integer_kernels(path)"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("", "")


def test_the_users_logging_and_warning_settings_are_put_back(tmp_path: Path) -> None:
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exported(two_layers(), torch.rand(4, 16), tmp_path)
            with pytest.raises(UserWarning, match="still an error"):
                warnings.warn("still an error", stacklevel=1)
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(before)


def test_the_file_holds_no_path_of_the_machine_that_wrote_it(
    quantized: Quantized, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    content = exported(quantized(), images[0][:2], tmp_path).read_bytes()
    assert b"pkg.torch" not in content
    assert b".py" not in content


def test_a_failed_export_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    (tmp_path / "model.onnx").write_text("old")
    with pytest.raises(QatkitError, match="cannot export this model"):
        exported(Branch(), torch.rand(2, 3), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "old"


@pytest.mark.parametrize(
    ("weight", "activation", "message"),
    [
        (QuantSpec(), QuantSpec(strategy="token"), r"layer '0': .*strategy: token.* set activation: .*tensor"),
        (None, UINT8, r"layer '0': the input is quantized but the weight is not, .*; set weight"),
        (QuantSpec(), UINT8, r"layer '0': the activation scale was never set; call qatkit.calibrate"),
    ],
)
def test_what_cannot_be_written_is_refused_with_what_to_write_instead(
    weight: QuantSpec | None, activation: QuantSpec, message: str, tmp_path: Path
) -> None:
    model = two_layers()
    prepare_qat(model, weight, activation)
    if weight is None:
        calibrate(model, [torch.rand(4, 16)])
    with pytest.raises(QatkitError, match=message):
        exported(model, torch.rand(4, 16), tmp_path)


def test_other_weight_dtypes_are_refused(tmp_path: Path) -> None:
    model = two_layers().bfloat16()
    prepare_qat(model, QuantSpec())
    with pytest.raises(QatkitError, match="layer '0': the weight is bfloat16"):
        exported(model, torch.rand(4, 16).bfloat16(), tmp_path)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(QatkitError, match=r"pip install 'qatkit\[onnx\]'"):
        exported(two_layers(), torch.rand(4, 16), tmp_path)
