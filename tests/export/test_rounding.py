"""The bound of `verify` where rounding spreads: measured with random errors of a few float32 roundings."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from qatkit import QuantSpec, calibrate, prepare_qat
from qatkit.export import rounding
from qatkit.export.onnx.format import export_onnx
from qatkit.export.rounding import with_rounding
from qatkit.export.verification import verify
from qatkit.models import resnet
from qatkit.quantization import prepare_for_target
from tests.export.conftest import UINT8


def test_flips_are_as_frequent_as_the_distance_to_the_boundary_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A code c flips if its value's distance from a boundary, uniform in [0, 1/2], is below c * NOISE * u, u in
    [-1, 1]: with probability c * NOISE / 2, c = 100.
    """
    noise = 2.0**-12  # large against the float32 rounding inside the quantizer
    monkeypatch.setattr(rounding, "NOISE", noise)
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    prepare_qat(model, None, UINT8)
    calibrate(model, [torch.tensor([[0.0], [255.0]]).double()])
    x = 100 + torch.rand(1_000_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.5
    with torch.no_grad():
        flips = (with_rounding(model)(x) != model(x)).sum().item()
    assert flips == pytest.approx(len(x) * 100 * noise / 2, rel=0.05)


def test_values_on_a_boundary_count_although_float32_and_float64_agree_on_them() -> None:
    """Halves are exact in both, so their difference says nothing of a runtime that multiplies by 1 / scale."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    prepare_qat(model, None, UINT8)
    calibrate(model, [torch.tensor([[0.0], [255.0]])])
    x = torch.arange(200.0).view(-1, 1) + 0.5
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model).double()(x.double()), model(x).double())
        flips = (with_rounding(model)(x.double()) != model(x)).sum().item()
    # a quantizer divides in float32, so an error counts if it exceeds half a unit in the last place, in one direction
    unit = 2.0 ** (x.double().log2().floor() - 23)
    p = (1 - (unit / 2) / (x.double() * rounding.NOISE)) / 2
    assert abs(flips - p.sum()) < 4 * (p * (1 - p)).sum().sqrt(), "each with the probability p"


def test_a_deep_residual_network_in_which_flips_spread_passes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = resnet((16, 32)).eval(), torch.rand(256, 1, 16, 16)
    prepare_for_target(model, "onnxruntime", x)
    calibrate(model, [x])
    export_onnx(model, x, tmp_path / "model.onnx")
    result = verify(model, tmp_path / "model.onnx", [(x, torch.zeros(256, dtype=torch.long))])
    assert result.passed, result.summary()


def test_the_copy_is_in_float64_and_the_model_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prepare_qat(model, QuantSpec(8), UINT8)
    calibrate(model, [torch.rand(8, 4)])
    before = model(torch.ones(2, 4))
    assert with_rounding(model)(torch.ones(2, 4).double()).dtype == torch.float64
    assert torch.equal(model(torch.ones(2, 4)), before)
