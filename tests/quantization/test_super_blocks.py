"""Super-blocks: integer scales and minima under float16 steps, compared with their formula in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qatkit import QatkitError, QuantSpec, dequantize, fake_quantize, prepare_qat, quantize, scheme
from qatkit.quantization.estimators import QParams, computed_qparams, mse_qparams
from qatkit.quantization.mixed.records import stored_bytes
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.prepare import qat_layers
from qatkit.quantization.ptq.runner import apply_ptq
from qatkit.quantization.scale_dtypes import SCALE_DTYPES
from qatkit.quantization.state import load_quantizers, save_quantizers
from qatkit.quantization.super_blocks import steps_of

NAMES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def spec(name: str, **changes: Any) -> QuantSpec:
    found = scheme(name).weight
    assert found is not None
    return QuantSpec(**{**found.__dict__, **changes})


def rows() -> Tensor:
    """Usual weights, and blocks of one sign, of one value, of zeros, with an outlier and of tiny and huge values."""
    x = torch.randn(10, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    x[1], x[2], x[3] = -x[1].abs(), x[2].abs() + 0.1, -0.3
    x[4, :256], x[5, 40], x[6, ::2] = 0, 50.0, 0
    x[7], x[8] = x[7] * 1e-5, x[8] * 1e6
    x[9, 3] = -1e-12
    return x


def exact(x: Tensor, scale: Tensor, minimum: Tensor, spec: QuantSpec) -> Tensor:
    """``code * scale - minimum`` with the nearest code, in float64 from the same quotient."""
    size = spec.group_size or 1
    scale, minimum = (part.repeat_interleave(size, dim=1) for part in (scale, minimum))
    codes = ((x + minimum) / scale).round().clamp(spec.qmin, spec.qmax)
    return (codes.double() * scale.double() - minimum.double()).float()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("search", [computed_qparams, mse_qparams])
def test_values_are_those_of_the_formula_and_scales_are_integers_of_float16_steps(name: str, search: Any) -> None:
    own, x = spec(name), rows()
    scale, minimum = search(x, own)
    steps = steps_of(scale, minimum, own)
    levels = SCALE_DTYPES[own.scale_dtype].levels
    assert torch.equal(steps, steps.half().float())
    for values, step, lowest in zip((scale, minimum), steps.unbind(-1), (levels[0], 0), strict=False):
        integers = (values.double().view(10, 2, -1) / step.double().unsqueeze(-1)).flatten(1)
        assert torch.equal(integers, integers.round())
        assert (integers.min() >= lowest) & (integers.max() <= levels[1])
    assert (scale != 0).all()
    values = fake_quantize(x, scale, minimum, own)
    assert torch.equal(values, exact(x, scale, minimum, own))
    assert torch.equal(values, dequantize(quantize(x, scale, minimum, own), scale, minimum, own))
    assert (values[4, :256] == 0).all(), "zeros"
    assert torch.equal(values, fake_quantize(values, scale, minimum, own)), "values on the grid stay"


@pytest.mark.parametrize("name", NAMES)
def test_the_search_has_a_smaller_error_than_ranges_also_if_it_is_weighted(name: str) -> None:
    own, x = spec(name), rows()[:8]
    weights = torch.rand(512, generator=torch.Generator().manual_seed(1)).pow(4).expand_as(x)

    def errors(qparams: QParams, weights: Tensor) -> Tensor:
        return ((fake_quantize(x, *qparams, own) - x).square() * weights).double().sum(1)

    plain, weighted, ranges = mse_qparams(x, own), mse_qparams(x, own, weights=weights), computed_qparams(x, own)
    assert (errors(plain, torch.ones_like(x))[:3] < 0.95 * errors(ranges, torch.ones_like(x))[:3]).all()
    assert (errors(plain, torch.ones_like(x)) <= errors(ranges, torch.ones_like(x)) * 1.0001).all()
    assert (errors(weighted, weights)[:3] < errors(plain, weights)[:3]).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_straight_through_and_those_of_the_formula(name: str) -> None:
    """Compared: autograd through the formula in float64, in which only the rounding has gradient 1."""
    own = spec(name, observer="lsq_plus" if spec(name).has_minimum else "lsq")
    x = rows()[:3].requires_grad_()
    fake_quant = FakeQuantize(own, "weight", (3, 512 // (own.group_size or 1)))
    fake_quant.initialize(x.detach() * 0.7)  # a narrower range, so that some values are clipped
    grad = torch.randn(3, 512, generator=torch.Generator().manual_seed(2))
    (fake_quant(x) * grad).sum().backward()

    v = x.detach().double().view(3, -1, own.group_size or 1).requires_grad_()
    latent = [part.detach().double().unsqueeze(-1).requires_grad_() for part in fake_quant.qparams(x)]
    scale, minimum = latent
    position = (v + minimum) / scale
    clipped = position.clamp(own.qmin, own.qmax)
    values = (clipped + (clipped.round() - clipped).detach()) * scale - minimum
    (values * grad.double().view_as(values)).sum().backward()
    assert ((position < own.qmin) | (position > own.qmax)).any()
    assert x.grad is not None
    assert v.grad is not None
    assert torch.allclose(x.grad.double(), v.grad.flatten(1), atol=1e-6)
    factor = fake_quant._gradient_scale(x, fake_quant.scale)  # type: ignore[arg-type]
    pairs = [(fake_quant.scale, scale, 1.0), (fake_quant.offset, minimum, -1.0)][: 1 + own.has_minimum]
    for ours, theirs, sign in pairs:
        assert isinstance(ours, nn.Parameter)
        assert ours.grad is not None
        assert theirs.grad is not None
        expected = sign * factor * theirs.grad.squeeze(-1)
        assert torch.allclose(ours.grad.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_learned_scales_move_and_stay_integers_of_the_same_steps(name: str) -> None:
    torch.manual_seed(0)
    own = spec(name, observer="lsq_plus" if spec(name).has_minimum else "lsq")
    model = nn.Sequential(nn.Linear(512, 8))
    prepare_qat(model, own)
    fake_quant = qat_layers(model)[0][1].weight_fake_quant
    assert fake_quant is not None
    assert fake_quant.outer_scale is not None
    before = [part.clone() for part in fake_quant.whole_qparams(model[0].weight)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(3):
        model(torch.randn(16, 512)).square().mean().backward()
        optimizer.step()
    after = fake_quant.whole_qparams(model[0].weight)
    steps = fake_quant.outer_scale
    for values, old, step in zip(after, before, steps.unbind(-1), strict=False):
        assert not torch.equal(values, old)
        integers = values.view(8, 2, -1) / step.unsqueeze(-1)
        assert torch.equal(integers, integers.round())


@pytest.mark.parametrize("name", NAMES)
def test_quantizers_are_saved_and_loaded_and_moved_with_their_steps(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = nn.Sequential(nn.Linear(512, 8)), nn.Sequential(nn.Linear(512, 8))
    prepare_qat(model, spec(name))
    other.load_state_dict({key: value for key, value in model.state_dict().items() if "fake_quant" not in key})
    save_quantizers(model, tmp_path / "quantizers.safetensors")
    with torch.no_grad():
        other[0].weight += 0.01  # frozen scales do not follow the weight
        load_quantizers(other, tmp_path / "quantizers.safetensors")
        other[0].weight -= 0.01
    own, loaded = (qat_layers(each)[0][1].weight_fake_quant for each in (model, other))
    assert own is not None
    assert loaded is not None
    for mine, theirs in zip(own.buffers(), loaded.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    x = torch.randn(4, 512)
    prepared = nn.Sequential(nn.Linear(512, 8))
    prepare_qat(prepared, spec(name))
    prepared.load_state_dict(model.state_dict())
    assert torch.equal(prepared(x), model(x))
    assert model.to(torch.bfloat16)[0].weight_fake_quant.outer_scale.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_has_the_bytes_that_the_gguf_package_states(name: str) -> None:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    assert stored_bytes([3, 1024], spec(name)) == 3 * 1024 // block * size


def test_the_inputs_weigh_the_error_in_importance_and_the_weight_stays() -> None:
    torch.manual_seed(0)
    sizes = torch.rand(256).pow(6)

    def prepared() -> nn.Sequential:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(256, 32, bias=False))
        prepare_qat(model, spec("Q2_K"))
        return model

    mixed = torch.eye(256) + 0.5 * torch.randn(256, 256) / 16
    x, plain, weighted, compensated = torch.randn(512, 256) * sizes @ mixed, prepared(), prepared(), prepared()
    assert apply_ptq(weighted, "importance", [x]) == ["0"]
    assert apply_ptq(compensated, "gptq", [x]) == ["0"]
    exact = x @ plain[0].weight.t()
    assert torch.equal(plain[0].weight, weighted[0].weight)
    error, smaller, smallest = ((model(x) - exact).norm() for model in (plain, weighted, compensated))
    assert smaller < 0.9 * error
    assert smallest < 0.9 * smaller
    layer = qat_layers(compensated)[0][1]
    assert torch.equal(layer.fake_quantized_weight(), layer.weight), "on the grid"


def test_specs_and_layers_that_do_not_fit_are_refused_with_what_fits() -> None:
    for fields, message in {
        ("uint6", True, "group", 32, "mse"): r"symmetric: scale_dtype 'uint6' requires asymmetric codes; set.*false",
        ("int8", False, "group", 16, "mse"): r"symmetric: scale_dtype 'int8' requires symmetric codes; set.*true",
        ("int8", True, "channel", None, "mse"): r"scale_dtype: 'int8' is supported only for integers in groups",
        ("int8", True, "group", 48, "mse"): r"scale_dtype: 'int8' is supported only for integers in groups",
        ("int8", True, "group", 16, "minmax"): r"observer: 'minmax' is not supported with scale_dtype 'int8'.*use mse",
    }.items():
        dtype, symmetric, strategy, size, observer = fields
        with pytest.raises(QatkitError, match=message):
            QuantSpec(4, symmetric, strategy, size, observer, dtype)  # type: ignore[arg-type]
    with pytest.raises(QatkitError, match=r"scale_rule: 'signed' has no effect with scale_dtype 'int8'"):
        spec("Q6_K", scale_rule="signed")
    with pytest.raises(QatkitError, match=r"unknown scale_dtype 'uint5'; did you mean 'uint\d'"):
        QuantSpec(scale_dtype="uint5")
    with pytest.raises(QatkitError, match=r"activation\.scale_dtype: 'int8' is supported only for weights"):
        prepare_qat(nn.Sequential(nn.Linear(256, 8)), activation=spec("Q6_K"))
    model = nn.Sequential(nn.Linear(256, 96), nn.Linear(96, 33), nn.Linear(33, 2))
    blocks = r"super-blocks of 256 do not divide in_features=96 of layer '1'; set layers: \{1: \{scheme: Q4_0\}\}"
    with pytest.raises(QatkitError, match=blocks):
        prepare_qat(model, spec("Q4_K"))
    with pytest.raises(QatkitError, match=r"in_features=33 of layer '2'; exclude the layer"):
        prepare_qat(model, spec("Q4_K"), exclude=["1"])
    with pytest.raises(QatkitError, match=r"no multiples of one float16 number; use the scales of mse_qparams"):
        steps_of(torch.rand(1, 8), torch.zeros(1, 8), spec("Q4_K"))


def test_scales_that_are_refused_leave_the_quantizer_unchanged() -> None:
    model = nn.Sequential(nn.Linear(256, 4))
    prepare_qat(model, spec("Q4_K"))
    fake_quant = qat_layers(model)[0][1].weight_fake_quant
    assert fake_quant is not None
    before = [buffer.clone() for buffer in fake_quant.buffers()]
    with pytest.raises(QatkitError, match="no multiples of one float16 number"):
        fake_quant.set_qparams(torch.rand(4, 8), torch.zeros(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(before, fake_quant.buffers(), strict=True))


def test_tensors_of_another_version_are_named(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Linear(256, 4)), tmp_path / "quantizers.safetensors"
    plain = copy.deepcopy(model)
    prepare_qat(model, spec("Q4_K"))
    save_quantizers(model, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), "0.weight.tensor_scale": torch.ones(1)}, path, metadata=metadata)
    with pytest.raises(QatkitError, match=r"do not have 0\.weight\.tensor_scale.*save the quantizers again"):
        load_quantizers(plain, path)
