"""An update inside the weight: what is rounded and masked is W + BA, in training as in the merge."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit import QatkitError, QuantSpec, prepare_qat
from qatkit.export.dense import export_dense
from qatkit.lora.attachment import Adapter, adapted_layers, attach, merge, target_layers
from qatkit.lora.layers import AdaptedQATLinear, AdaptedWeight
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.prepare import qat_layers
from qatkit.quantization.ptq.runner import apply_ptq

OBSERVERS = ["minmax", "mse", "lsq"]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)).to(dtype)


def adapted(observer: str = "lsq", dtype: torch.dtype = torch.float32, held: bool = False) -> nn.Sequential:
    model = network(dtype)
    if held:
        for layer in (model[0], model[2]):
            assert isinstance(layer, nn.Linear)
            layer.weight.data[:, ::2] = 0
    prepare_qat(model, weight=QuantSpec(4, strategy="group", group_size=16, observer=observer))  # type: ignore[arg-type]
    names = target_layers(model)
    attach(model, names, Adapter(rank=4, alpha=8), names if held else ())
    return model


def train(model: nn.Module, steps: int = 5, lr: float = 1e-2) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    torch.manual_seed(4)
    for _ in range(steps):
        x = torch.randn(16, 32, dtype=next(model.parameters()).dtype)
        F.cross_entropy(model(x).float(), torch.randint(8, (16,))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("observer", OBSERVERS)
def test_the_merge_computes_what_training_computed_to_the_last_bit(observer: str, tmp_path: Path) -> None:
    model, x = adapted(observer), torch.randn(9, 32)
    before = model(x)
    train(model)
    trained = model(x)
    codes = {
        name: quantize(layer.matrix, *layer.weight_fake_quant.qparams(layer.matrix), layer.weight_fake_quant.spec)
        for name, layer in qat_layers(model)
        if layer.weight_fake_quant is not None
    }
    assert merge(model) == ["0", "2"]
    assert torch.equal(model(x), trained)
    assert not torch.allclose(trained, before, atol=1e-3)
    export_dense(model, tmp_path / "model.safetensors")
    shipped = load_file(tmp_path / "model.safetensors")
    for name, layer in qat_layers(model):
        assert layer.weight_fake_quant is not None
        qparams = layer.weight_fake_quant.qparams(layer.weight)
        assert torch.equal(quantize(layer.weight, *qparams, layer.weight_fake_quant.spec), codes[name])
        scale, rows = qparams[0].detach(), codes[name].view(layer.weight.shape[0], -1, 16)
        assert torch.equal(shipped[f"{name}.weight"], (rows * scale.unsqueeze(-1)).view_as(layer.weight))
    assert sorted(model.state_dict()) == sorted(adapted_state_without_factors(observer))


def adapted_state_without_factors(observer: str) -> list[str]:
    model = network()
    prepare_qat(model, weight=QuantSpec(4, strategy="group", group_size=16, observer=observer))  # type: ignore[arg-type]
    return list(model.state_dict())


def test_rounding_the_sum_is_another_model_than_rounding_the_base() -> None:
    model, x = adapted("mse"), torch.randn(9, 32)
    train(model)
    layer = model[0]
    assert isinstance(layer, AdaptedQATLinear)
    fake_quant = layer.weight_fake_quant
    assert fake_quant is not None
    update = layer.scaling * layer.lora_B @ layer.lora_A
    inside = F.linear(x, fake_quant(layer.weight + update), layer.bias)
    beside = F.linear(x, fake_quant(layer.weight) + update, layer.bias)
    torch.testing.assert_close(layer(x), inside)
    assert (layer(x) - beside).abs().max() > 1e-2


@pytest.mark.parametrize("held", [False, True])
def test_gradients_are_those_of_the_product_in_float64(held: bool) -> None:
    model = adapted("minmax", torch.float64, held)
    train(model, 3)
    layer, x = model[0], torch.randn(9, 32, dtype=torch.float64)
    assert isinstance(layer, AdaptedWeight)
    weights = torch.randn(9, 48, dtype=torch.float64)
    layer.lora_A.grad = layer.lora_B.grad = None
    (layer(x) * weights).sum().backward()
    # straight through the rounding: the gradient of the loss by the weight itself, then the chain rule by hand
    by_weight = weights.t() @ x
    if held:
        by_weight = by_weight * (layer.weight != 0)
    torch.testing.assert_close(layer.lora_A.grad, 2 * layer.lora_B.detach().t() @ by_weight)
    torch.testing.assert_close(layer.lora_B.grad, 2 * by_weight @ layer.lora_A.detach().t())
    assert layer.weight.grad is None


def test_the_optimizer_holds_adapters_and_scales_alone() -> None:
    model = adapted("lsq")
    optimizer = train(model, 2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = ("lora_A", "lora_B", "weight_fake_quant.scale")
    assert trained == {f"{layer}.{part}" for layer in ("0", "2") for part in parts}
    adapters = 4 * (32 + 48) + 4 * (48 + 8)
    scales = sum(fq.scale.numel() for fq in model.modules() if isinstance(fq, FakeQuantize) and fq.scale is not None)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapters + scales
    state = sum(value.numel() for state in optimizer.state.values() for key, value in state.items() if key != "step")
    assert state == 2 * (adapters + scales)


def test_no_merged_or_rounded_weight_is_kept_for_the_backward_pass() -> None:
    from benchmarks.tensor_memory import TensorMemory

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(12)))
    prepare_qat(model, weight=QuantSpec(4, observer="lsq"))
    full = copy.deepcopy(model)
    attach(model, target_layers(model), Adapter(rank=2))
    peaks = {}
    for name, network in (("adapters", model), ("full", full)):
        with TensorMemory() as memory:
            network(torch.randn(4, 256)).sum().backward()
        peaks[name] = memory.peak / (4 * 256 * 256)
    assert peaks["adapters"] < 9, "more than the weights of one layer at a time"
    assert peaks["full"] > 12, "the measure must see what plain training keeps: the gradients alone are 12"


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros_in_training_and_in_the_merge(symmetric: bool) -> None:
    model = network()
    for layer in (model[0], model[2]):
        assert isinstance(layer, nn.Linear)
        layer.weight.data[torch.rand_like(layer.weight) < 0.5] = 0
    zeros = {name: module.weight == 0 for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not symmetric:
        prepare_qat(model, weight=QuantSpec(4, symmetric=False, observer="lsq"))
    attach(model, ["0", "2"], Adapter(4, 8), held=["0", "2"])
    start = copy.deepcopy(model)
    train(model)
    x = torch.randn(9, 32)
    trained = model(x)
    merge(model)
    assert torch.equal(model(x), trained)
    for name, mask in zeros.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        assert not weight[mask].any()
        assert (weight != start.get_submodule(name).weight).sum() > 0.9 * (~mask).sum(), "the rest was trained"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_merge_is_exact_for_weights_of_16_bits_and_under_autocast(dtype: torch.dtype) -> None:
    model, x = adapted("lsq", dtype), torch.randn(9, 32, dtype=dtype)
    layer = model[0]
    assert isinstance(layer, AdaptedWeight)
    assert layer.lora_A.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        train(model)
        trained = model(x)
        merge(model)
        assert torch.equal(model(x), trained)


def test_gptq_sets_the_frozen_weight_below_the_adapters() -> None:
    batches = [torch.randn(64, 32) for _ in range(2)]
    plain = network()
    prepare_qat(plain, weight=QuantSpec(3, observer="lsq"))
    model = copy.deepcopy(plain)
    attach(model, ["0", "2"], Adapter(4, 8))
    for each in (plain, model):
        apply_ptq(each, "gptq", batches)
    x = torch.randn(9, 32)
    assert torch.equal(model(x), plain(x))
    original = network()[0]
    assert isinstance(original, nn.Linear)
    assert not torch.equal(model.state_dict()["0.weight"], original.weight)
    train(model)
    with pytest.raises(QatkitError, match=r"init: a trained adapter cannot be moved"):
        apply_ptq(model, "gptq", batches)


def test_a_deepcopy_and_a_state_dict_carry_the_adapters() -> None:
    model, x = adapted("lsq"), torch.randn(9, 32)
    train(model)
    other = adapted("lsq")
    other.load_state_dict(model.state_dict())
    for copied in (copy.deepcopy(model), other):
        assert torch.equal(copied(x), model(x))
    assert list(adapted_layers(other)) == ["0", "2"]
