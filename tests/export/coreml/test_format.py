"""Core ML packages: coremltools reads exactly the trained codes, scales and parameters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatkit import QatkitError, QuantSpec, prepare_qat, scheme
from qatkit.export.formats import FORMATS, format_of_path
from qatkit.export.verification import verify
from qatkit.models import cnn, llama
from qatkit.quantization.layers import QATLayer
from qatkit.schemes import Scheme

pytest.importorskip("coremltools")
from qatkit.export.coreml.content import PACKAGE, constant_name, read_constants
from qatkit.export.coreml.format import export_coreml


class Mixed(nn.Module):
    """All kinds of layers that the format quantizes, with a BatchNorm that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 32)
        self.narrow = nn.Conv1d(32, 16, 3, padding=1)
        self.norm = nn.LayerNorm(16)
        self.image = nn.Conv2d(1, 4, 3, padding=1, groups=1)
        self.late = nn.BatchNorm2d(4)
        self.first = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.narrow(self.words(ids).transpose(1, 2)).transpose(1, 2))
        x = self.late(torch.relu(self.image(x[:, None]))).mean(2).flatten(1)
        return self.head(torch.relu(self.first(x)))


IDS = torch.randint(20, (6, 8), generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6)
SCHEMES = {
    "words": Scheme(QuantSpec(8)),
    "narrow": Scheme(QuantSpec(8, symmetric=False, observer="mse")),
    "image": Scheme(QuantSpec(4, strategy="tensor", observer="lsq")),
    "first": Scheme(QuantSpec(4, strategy="group", group_size=32)),
    "head": Scheme(QuantSpec(3, symmetric=False, strategy="group", group_size=16, observer="lsq_plus")),
}


def mixed() -> Any:
    torch.manual_seed(0)
    model = Mixed()
    prepare_qat(model, layers=SCHEMES)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IDS), LABELS).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_coremltools_reads_the_trained_codes_scales_and_parameters(tmp_path: Path) -> None:
    model = mixed()
    export_coreml(model, IDS, tmp_path / "out")
    constants = read_constants(tmp_path / "out")
    kinds = {}
    for name in SCHEMES:
        layer: QATLayer = getattr(model, name)
        assert layer.weight_fake_quant is not None
        found = constants[constant_name(f"{name}.weight")]
        assert torch.equal(torch.from_numpy(found.values), layer.fake_quantized_weight().detach())
        scale, zero_point = layer.weight_fake_quant.whole_qparams(layer.matrix)
        assert found.codes is not None
        assert found.scale is not None
        assert torch.equal(torch.from_numpy(found.scale).view(scale.shape), scale)
        kinds[name] = found.codes.dtype.name
        groups = torch.from_numpy(found.codes).double().reshape(*scale.shape, -1)
        zero = torch.from_numpy(found.offset).double().view(scale.shape) if found.offset is not None else zero_point
        assert torch.equal((groups - zero[..., None]).float() * scale[..., None], groups_of(layer, scale))
    assert kinds == {"words": "int8", "narrow": "uint8", "image": "int8", "first": "int8", "head": "uint8"}
    size = sum(file.stat().st_size for file in (tmp_path / "out").rglob("weight.bin"))
    assert size < 0.5 * 4 * sum(parameter.numel() for parameter in model.parameters())
    check = verify(model, tmp_path / "out", [(IDS, LABELS)])
    assert check.passed, check.failures
    assert (check.format, check.layers, check.mean_error, check.not_run) == ("coreml", 5, 0.0, "Core ML")
    assert "but Core ML did not run" in check.text
    assert "--python" not in check.text
    assert format_of_path(tmp_path / "out").name == "coreml"


def groups_of(layer: QATLayer, scale: Tensor) -> Tensor:
    return layer.fake_quantized_weight().detach().reshape(*scale.shape, -1)


@pytest.mark.slow
def test_a_plain_model_is_stored(tmp_path: Path) -> None:
    model = cnn(channels=[4], in_channels=1, num_classes=10).eval()
    x = torch.rand(3, 1, 8, 8)
    export_coreml(model, x, tmp_path / "plain")
    check = verify(model, tmp_path / "plain", [(x, torch.arange(3))])
    assert check.passed, check.failures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.words.weight.data.__setitem__((0, 0), 3.0), r"'words\.weight': .* (values|codes) differ"),
        (lambda model: model.head.weight_fake_quant.scale.data.mul_(2), r"'head\.weight': .* scales differ"),
        (lambda model: model.image.weight_fake_quant.scale.data.mul_(2), r"'image\.weight': 1 of 1 scales differ"),
        (lambda model: model.norm.bias.data.add_(1), r"'norm\.bias': 16 of 16 values differ"),
        (lambda model: model.late.running_mean.add_(1), r"'late\.running_mean': 4 of 4 values differ"),
        (lambda model: model.first.bias.data.add_(1), r"'first\.bias': 64 of 64 values differ"),
    ],
)
def test_a_package_of_another_model_is_named(change: Any, message: str, packed: Path) -> None:
    model = mixed()
    change(model)
    failures = verify(model, packed, [(IDS, LABELS)]).failures
    assert any(re.search(message, failure) for failure in failures), failures


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coreml") / "out"
    export_coreml(mixed(), IDS, folder)
    return folder


@pytest.mark.slow
def test_one_changed_bit_of_the_weights_is_found(packed: Path) -> None:
    (file,) = packed.rglob("weight.bin")
    before = file.read_bytes()
    changed = bytearray(before)
    changed[128 + 5] ^= 1  # the first blob's data, after the headers of the file and of the blob
    file.write_bytes(changed)
    failures = verify(mixed(), packed, [(IDS, LABELS)]).failures
    file.write_bytes(before)
    assert any("differ, the first at" in failure for failure in failures), failures


@pytest.mark.slow
def test_a_package_that_cannot_be_read_is_a_failure(tmp_path: Path) -> None:
    model = mixed()
    export_coreml(model, IDS, tmp_path / "out")
    (file,) = (tmp_path / "out").rglob("*.mlmodel")
    file.write_bytes(b"nothing")
    failures = verify(model, tmp_path / "out", [(IDS, LABELS)]).failures
    assert f"coremltools cannot read {PACKAGE}" in failures[0]


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        (scheme("W8A8"), r"layer 'first': Core ML export stores quantized weights, not quantized activations; remove"),
        (scheme("MXFP4A16"), r"stores integers, not float codes; set weight: \{num_bits: 4\}"),
        (scheme("TQ2_0"), r"stores integers, not ternary codes"),
    ],
)
def test_other_quantization_is_refused(quantize: Scheme, message: str) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(256, 8)

    model = Wide()
    prepare_qat(model, quantize.weight, quantize.activation)
    with pytest.raises(QatkitError, match=message):
        FORMATS["coreml"].check_model(model)


def test_layers_dtypes_and_names_that_do_not_fit_are_refused() -> None:
    with pytest.raises(QatkitError, match="layer '0': Core ML export does not support LSTM"):
        FORMATS["coreml"].check_model(nn.Sequential(nn.LSTM(4, 4)))
    with pytest.raises(QatkitError, match=r"'0\.weight' is bfloat16, but Core ML export supports only float32"):
        FORMATS["coreml"].check_model(nn.Sequential(nn.Linear(4, 4)).bfloat16())
    model = nn.ModuleDict({"a_b": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2)})})
    with pytest.raises(QatkitError, match=r"'a_b\.weight' and 'a\.b\.weight' have the same name in Core ML"):
        FORMATS["coreml"].check_model(model)


@pytest.mark.slow
def test_an_operation_that_coremltools_cannot_convert_is_named(tmp_path: Path) -> None:
    class Unusual(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i0e(x)

    with pytest.raises(QatkitError, match=r"coremltools cannot convert this model: .*i0e"):
        export_coreml(Unusual(), torch.rand(2, 4), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_of_transformers_are_refused_before_training() -> None:
    with pytest.raises(QatkitError, match="coremltools does not convert models of transformers such as LlamaForCausal"):
        FORMATS["coreml"].check_model(llama(300, 32, 1, 2, 1, 64, 16))
