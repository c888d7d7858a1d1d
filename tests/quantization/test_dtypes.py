"""Scales, offsets and zero points are float32, whatever the dtype of the model or torch's default dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qatkit import QuantSpec, apply_ptq, calibrate, prepare_qat, scheme
from qatkit.quantization import computed_qparams, fake_quantizers, mse_qparams
from qatkit.quantization.monitoring import LayerWatch

NVFP4 = scheme("NVFP4A16").weight
assert NVFP4 is not None
WEIGHTS = {
    "minmax": QuantSpec(num_bits=4),
    "mse": QuantSpec(num_bits=4, observer="mse"),
    "lsq": QuantSpec(num_bits=4, observer="lsq"),
    "lsq_plus": QuantSpec(num_bits=4, symmetric=False, observer="lsq_plus"),
    "nvfp4": replace(NVFP4, observer="lsq"),
    "ternary": QuantSpec(num_bits=2, type="ternary", observer="lsq"),
}
STATIC = QuantSpec(num_bits=8, symmetric=False, strategy="tensor")
CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "double": nn.Module.double,
    "to": lambda model: model.to(device="cpu", dtype=torch.bfloat16),
    "type": lambda model: model.type(torch.float16),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(before)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    nn.init.uniform_(layers[0].weight, -0.03, 0.03)
    return layers


def batch() -> Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


def scales(layers: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, fake_quant in fake_quantizers(layers)
        for key, value in fake_quant.state_dict().items()
    }


@pytest.mark.parametrize("spec", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_converting_a_model_leaves_its_scales_unchanged(
    spec: QuantSpec, convert: Callable[[nn.Module], nn.Module]
) -> None:
    layers = model()
    prepare_qat(layers, weight=spec, activation=STATIC)
    calibrate(layers, [batch()])
    before = scales(layers)
    convert(layers)
    after = scales(layers)
    assert layers[0].weight.dtype != torch.float32
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, before[name]), name


def test_nvfp4_weights_survive_half_precision() -> None:
    layers = model()
    prepare_qat(layers, weight=WEIGHTS["nvfp4"])
    before = (layers[0].fake_quantized_weight() == 0).float().mean()
    layers.half()
    after = (layers[0].fake_quantized_weight() == 0).float().mean()
    assert abs(before - after) < 0.02


def test_scales_follow_the_model_to_another_device() -> None:
    layers = model()
    prepare_qat(layers, weight=WEIGHTS["lsq"], activation=STATIC)
    layers.to("meta", torch.bfloat16)
    assert {value.device.type for value in scales(layers).values()} == {"meta"}
    assert {value.dtype for value in scales(layers).values()} == {torch.float32}


def test_a_state_dict_of_another_dtype_is_loaded_into_float32_scales() -> None:
    layers = model()
    prepare_qat(layers, weight=WEIGHTS["lsq"], activation=STATIC)
    calibrate(layers, [batch()])
    state = {key: value.bfloat16() for key, value in layers.state_dict().items()}
    for assign in (False, True):
        other = copy.deepcopy(layers)
        other.load_state_dict(state, assign=assign)
        assert {value.dtype for value in scales(other).values()} == {torch.float32}
        assert isinstance(other[0].weight_fake_quant.scale, nn.Parameter)


@pytest.mark.parametrize("spec", WEIGHTS.values(), ids=WEIGHTS)
def test_scales_do_not_depend_on_the_default_dtype(spec: QuantSpec) -> None:
    weight = model()[0].weight.detach()
    with default_dtype(torch.bfloat16):
        assert all(value.dtype == torch.float32 for value in mse_qparams(weight, spec))
        under = [*mse_qparams(weight, spec), *computed_qparams(weight, spec)]
    assert all(map(torch.equal, under, [*mse_qparams(weight, spec), *computed_qparams(weight, spec)]))


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "kl", "mse", "lsq", "lsq_plus"])
def test_a_prepared_and_calibrated_model_does_not_depend_on_the_default_dtype(observer: str) -> None:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        layers = model()
        with default_dtype(dtype):
            prepare_qat(layers, weight=WEIGHTS["mse"], activation=replace(STATIC, observer=observer))
            calibrate(layers, [batch(), 2 * batch()])
            results.append([*scales(layers).values(), LayerWatch().observe(layers[0])])
    for expected, value in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", ["rtn", "mse", "gptq", "awq", "smoothquant"])
def test_a_ptq_method_does_not_depend_on_the_default_dtype(method: str) -> None:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        layers = model()
        prepare_qat(layers, weight=QuantSpec(num_bits=3, observer="lsq"), activation=QuantSpec(strategy="token"))
        with default_dtype(dtype):
            apply_ptq(layers, method, [batch()])
        results.append(list(layers.state_dict().values()))
    assert all(map(torch.equal, *results))


def test_every_learned_scale_moves_in_bfloat16_training() -> None:
    layers = model()
    prepare_qat(layers, weight=WEIGHTS["lsq"])
    layers.bfloat16()
    before = scales(layers)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-4)
    layers(batch().bfloat16()).square().sum().backward()
    optimizer.step()
    for name, value in scales(layers).items():
        if name.endswith(".scale"):
            assert (value != before[name]).float().mean() > 0.95, name
