"""On a GPU quantization computes the numbers that the CPU computes, where files are written and verified."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatkit import QuantSpec, calibrate, fake_quantize, prepare_qat, quantize, scheme
from qatkit.pipeline.sharding import exact_division
from qatkit.quantization.estimators import computed_qparams
from qatkit.quantization.prepare import fake_quantizers
from qatkit.quantization.ptq.runner import apply_ptq
from tests.support.texts import VOCAB, tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SPECS = {
    "int4 groups": QuantSpec(4, strategy="group", group_size=32),
    "int4 groups by half the range": QuantSpec(4, strategy="group", group_size=32, scale_rule="range"),
    "int4 groups, zero point": QuantSpec(4, symmetric=False, strategy="group", group_size=32),
    "int8 channels": QuantSpec(8),
    "int8 tokens": QuantSpec(8, strategy="token"),
    "uint8 tensor": QuantSpec(8, symmetric=False, strategy="tensor"),
    "fp8 channels": QuantSpec(8, type="float"),
    "fp8 blocks": QuantSpec(8, type="float", strategy="block", block_structure=(48, 48)),
    "MXFP4": scheme("MXFP4").weight,
    "NVFP4": scheme("NVFP4").weight,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_scales_codes_values_and_gradients_are_those_of_the_cpu_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    assert spec is not None
    x, grad = torch.randn(192, 256).to(dtype), torch.randn(192, 256).to(dtype)
    x[3] = 0

    def computed(device: str) -> dict[str, Tensor]:
        own = x.to(device).requires_grad_()
        scale, zero_point = computed_qparams(own, spec)
        found = {"scale": scale, "zero point": zero_point}
        for way, clips, factor in (("inside", False, 1.0), ("clipped", True, 0.7)):
            used = scale * factor
            values = fake_quantize(own, used, zero_point, spec, clips=clips)
            (slope,) = torch.autograd.grad(values, own, grad.to(device))
            codes = quantize(own, used, zero_point, spec)
            found |= {f"values {way}": values, f"gradient {way}": slope, f"codes {way}": codes.view(torch.uint8)}
        return {key: value.detach().cpu() for key, value in found.items()}

    ours, theirs = computed("cuda"), computed("cpu")
    different = {
        key: int((ours[key] != theirs[key]).sum()) for key in theirs if not torch.equal(ours[key], theirs[key])
    }
    assert not different


@pytest.mark.parametrize("name", ["int4 groups", "int4 groups, zero point", "int8 tokens", "fp8 channels"])
def test_compiled_as_the_trainer_compiles_scales_and_values_are_those_of_the_cpu_too(name: str) -> None:
    spec, x = SPECS[name], torch.randn(192, 256)
    assert spec is not None

    def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = computed_qparams(x, spec)
        return scale, fake_quantize(x, scale, zero_point, spec)

    compiled = torch.compile(rounded, options=exact_division(), dynamic=False)
    for found, expected in zip(compiled(x.cuda()), rounded(x), strict=True):
        assert torch.equal(found.cpu(), expected)


def test_the_gradient_of_a_learned_scale_is_that_of_float64_but_for_the_order_of_its_sum() -> None:
    spec = QuantSpec(4, strategy="group", group_size=64)
    x, grad = torch.randn(64, 256), torch.randn(64, 256)
    scale = computed_qparams(x, spec)[0] * 0.7

    def slope(device: str, dtype: torch.dtype) -> Tensor:
        own = scale.to(device, dtype).requires_grad_()
        values = fake_quantize(x.to(device, dtype), own, torch.zeros_like(own), spec)
        return torch.autograd.grad(values, own, grad.to(device, dtype))[0].cpu().double()

    torch.testing.assert_close(slope("cuda", torch.float32), slope("cpu", torch.float64), rtol=1e-4, atol=1e-4)


def test_a_layer_multiplies_the_operands_that_it_multiplies_on_the_cpu() -> None:
    model, x = nn.Sequential(nn.Linear(128, 96)), torch.randn(32, 128)
    prepare_qat(model, QuantSpec(4, strategy="group", group_size=32), QuantSpec(8, strategy="token"))
    on_gpu = copy.deepcopy(model).cuda()
    ours, theirs = on_gpu[0].operands(x.cuda()), model[0].operands(x)
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.equal(found.cpu(), expected)
    exact = nn.functional.linear(*(part.double() for part in theirs))
    torch.testing.assert_close(on_gpu(x.cuda()).cpu().double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "kl", "mse", "lsq", "lsq_plus"])
def test_calibration_on_a_gpu_gives_the_scales_of_the_cpu(observer: Any) -> None:
    model, batches = nn.Sequential(nn.Linear(64, 8)), [torch.randn(16, 64) for _ in range(3)]
    prepare_qat(model, QuantSpec(8), QuantSpec(8, symmetric=False, strategy="tensor", observer=observer))
    on_gpu = copy.deepcopy(model).cuda()
    calibrate(model, batches)
    calibrate(on_gpu, [batch.cuda() for batch in batches])
    for (name, ours), (_, theirs) in zip(fake_quantizers(on_gpu), fake_quantizers(model), strict=True):
        for found, expected in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert found.is_cuda
            assert torch.equal(found.cpu(), expected), name


@pytest.mark.parametrize("method", ["rtn", "mse", "gptq", "awq", "smoothquant"])
def test_a_ptq_method_is_as_good_on_a_gpu_as_on_the_cpu(method: str) -> None:
    tokens = torch.randint(VOCAB, (8, 16))
    dense = tiny_llama().eval()

    def error(device: str) -> float:
        model, own = copy.deepcopy(dense).to(device), tokens.to(device)
        # SmoothQuant moves what is hard in dynamic inputs
        dynamic = QuantSpec(8, strategy="token") if method == "smoothquant" else None
        prepare_qat(model, QuantSpec(3, strategy="group", group_size=16, observer="lsq"), dynamic, exclude=["lm_head"])
        assert apply_ptq(model, method, list(own.split(4)))
        with torch.no_grad():
            return (model(own).logits.cpu() - dense(tokens).logits).norm().item()

    assert error("cuda") == pytest.approx(error("cpu"), rel=0.05)


def test_a_compiled_step_has_the_loss_and_the_gradients_of_the_eager_one() -> None:
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).cuda()
    prepare_qat(model, QuantSpec(4, strategy="group", group_size=32, observer="lsq"), QuantSpec(8, strategy="token"))
    x = torch.randn(256, 128, device="cuda")

    def step(run: Any) -> list[Tensor]:
        loss = run(x).square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    # by itself Inductor divides less exactly than eager torch does: a few values fall on the other side of a border,
    # so that the gradient of a scale is off by some percent; qatkit's trainer compiles as here
    for found, expected in zip(step(torch.compile(model, options=exact_division())), step(model), strict=True):
        assert (found - expected).norm() <= 2e-3 * expected.norm()
