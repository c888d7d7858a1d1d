"""What each format does to each group of layers, against quantizing by hand; and what allocating by it brings."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit import QatkitError, QuantSpec, Scheme, calibrate, prepare_qat, scheme, strip_qat
from qatkit.data import digits
from qatkit.models import cnn, llama, mlp
from qatkit.quantization.folding import fold_batchnorm
from qatkit.quantization.mixed.allocation import allocate, totals
from qatkit.quantization.mixed.overrides import allocated_layers
from qatkit.quantization.mixed.records import Sensitivity
from qatkit.quantization.mixed.sensitivity import layer_groups, measure_sensitivity
from qatkit.quantization.prepare import qat_layers, quantized_weights

A8 = QuantSpec(symmetric=False, strategy="tensor")
CANDIDATES = {f"int{bits}": Scheme(QuantSpec(num_bits=bits)) for bits in (2, 3, 4, 8)}


def images(split: str) -> tuple[Tensor, Tensor]:
    rows = list(getattr(digits(), split))
    return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


def trained(model: nn.Module) -> nn.Module:
    """A model after a few seconds on the digits."""
    x, y = images("train")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(150):
        batch = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:64]
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    fold_batchnorm(model.eval())
    return model


@pytest.fixture(scope="module", params=[mlp, cnn], ids=["mlp", "cnn"])
def digits_model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return trained(request.param())


@pytest.fixture(scope="module")
def calibration() -> tuple[Tensor, Tensor]:
    return images("val")


def loss_on(data: tuple[Tensor, Tensor]) -> Any:
    return lambda model: F.cross_entropy(model(data[0]), data[1]).item()


def test_an_increase_is_that_of_quantizing_the_layer_by_hand(calibration: Any) -> None:
    torch.manual_seed(0)
    model, loss = trained(mlp(hidden=[32, 32])), loss_on(calibration)
    static = Scheme(QuantSpec(num_bits=4, observer="mse"), A8)
    found = measure_sensitivity(model, {**CANDIDATES, "static": static}, loss)
    assert [group.layers for group in found.groups] == [("1",), ("3",), ("5",)]
    assert found.loss == loss(model)
    by_hand = copy.deepcopy(model)
    layer: Any = by_hand[3]  # type: ignore[index]
    step = layer.weight.detach().abs().amax(dim=1, keepdim=True) / 7
    layer.weight.data = (layer.weight / step).round() * step
    assert found.groups[1].options["int4"].increase == pytest.approx(loss(by_hand) - loss(model), rel=1e-5)
    prepare_qat(model, *(static.weight, static.activation), include=["3"])
    calibrate(model, [calibration[0]])
    assert found.groups[1].options["static"].increase == loss(model) - found.loss
    assert [group.weights for group in found.groups] == [64 * 32, 32 * 32, 32 * 10]
    assert found.groups[1].options["int4"].bytes == 32 * 32 // 2 + 32 * 4


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was_even_when_stopped_midway(error: type[BaseException]) -> None:
    model = llama(vocab_size=64, hidden=32, layers=1, heads=4, kv_heads=2, intermediate=64, context=16)
    model.model.layers[0].mlp.eval()
    before, structure = copy.deepcopy(model.state_dict()), str(model)
    modes = [module.training for module in model.modules()]
    random, calls = torch.get_rng_state(), []

    def loss(model: nn.Module, stop: int) -> float:
        calls.append(1)
        if len(calls) == stop:
            raise error
        torch.rand(3)
        return float(model(torch.arange(8)[None]).logits.square().mean())

    static = Scheme(QuantSpec(num_bits=4, observer="lsq"), A8)
    for stop in (1, 2, 3, 5):
        calls.clear()
        with pytest.raises(error):
            measure_sensitivity(model, {"int4": CANDIDATES["int4"], "static": static}, lambda m: loss(m, stop))  # noqa: B023
        assert str(model) == structure
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), random)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert not any(module._forward_hooks for module in model.modules())


def test_a_second_measurement_is_equal_to_the_last_bit_whatever_random_numbers_the_loss_draws() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(16, 8)

    def loss(model: nn.Module) -> float:
        return float(model(x + torch.randn(16, 8)).square().mean())

    assert measure_sensitivity(model, CANDIDATES, loss) == measure_sensitivity(model, CANDIDATES, loss)


def test_layers_that_read_one_input_or_hold_one_weight_move_together() -> None:
    model = llama(vocab_size=64, hidden=32, layers=2, heads=4, kv_heads=2, intermediate=64, context=16)
    groups = layer_groups(model, include=["*", "model.embed_tokens"], exclude=["*layers.1.*"])
    layer = "model.layers.0"
    assert groups == [
        ["model.embed_tokens", "lm_head"],
        [f"{layer}.self_attn.{name}_proj" for name in "qkv"],
        [f"{layer}.self_attn.o_proj"],
        [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"],
        [f"{layer}.mlp.down_proj"],
    ]
    tokens = torch.arange(8)[None]

    def loss(model: nn.Module) -> float:
        return float(model(tokens, labels=tokens).loss)

    found = measure_sensitivity(model, CANDIDATES, loss, include=["*", "model.embed_tokens"])
    assert found.groups[0].weights == 64 * 32  # the tied matrix is stored once
    assert found.groups[0].options["int4"].bytes == 64 * 32 // 2 + 64 * 4
    assert found.groups[1].weights == 32 * 32 + 2 * 16 * 32


def test_fused_experts_are_measured_where_every_expert_has_scales_of_its_own() -> None:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model, tokens = transformers.MixtralForCausalLM(config), torch.arange(8)[None]
    found = measure_sensitivity(
        model,
        {"int4": Scheme(QuantSpec(4)), "W8A8": scheme("W8A8")},
        lambda model: float(model(tokens, labels=tokens).loss),
        include=["*.experts"],
    )
    (group,) = found.groups
    assert (group.layers, group.weights) == (("model.layers.0.mlp.experts",), 4 * 3 * 32 * 48)
    assert group.options["int4"].bytes == group.weights // 2 + 4 * 4 * (2 * 48 + 32)  # a scale for each expert's output
    (said,) = found.left_out
    assert "W8A8 is omitted" in said
    assert "only the weight of layer 'model.layers.0.mlp.experts' can be quantized" in said


def uniform(sensitivity: Sensitivity, candidate: str) -> dict[str, str]:
    return {group.name: candidate for group in sensitivity.groups}


def applied_loss(model: nn.Module, sensitivity: Sensitivity, allocation: dict[str, str], loss: Any) -> float:
    prepare_qat(model, layers=allocated_layers(sensitivity, allocation))
    for group in sensitivity.groups:
        for layer in group.layers:
            how = sensitivity.candidates[allocation[group.name]]
            assert dict(qat_layers(model))[layer].weight_fake_quant.spec == how.weight  # type: ignore[union-attr]
    value = float(loss(model))
    strip_qat(model)
    return value


@pytest.mark.parametrize("candidate", ["int3", "int4"])
def test_at_equal_bytes_an_allocation_loses_less_than_one_format_for_all(
    digits_model: nn.Module, calibration: Any, candidate: str
) -> None:
    loss, test = loss_on(calibration), loss_on(images("test"))
    found = measure_sensitivity(digits_model, CANDIDATES, loss)
    same = uniform(found, candidate)
    budget, _ = totals(found, same)
    chosen = allocate(found, budget_bytes=budget)
    names = [group.name for group in found.groups]
    every = [dict(zip(names, each, strict=True)) for each in product(CANDIDATES, repeat=len(names))]
    within = [totals(found, each)[1] for each in every if totals(found, each)[0] <= budget]
    assert totals(found, chosen)[0] <= budget
    assert totals(found, chosen)[1] == pytest.approx(min(within))  # the best of all by what was measured
    with torch.no_grad():
        # on some processors the network is trained to weights for which one format is the best allocation
        assert totals(found, chosen)[1] < totals(found, same)[1] or chosen == same
        # together, and on images that the formats were not chosen by; at 3 bits what layers lose does not simply add up
        slack = 1.25 if candidate == "int3" else 1.0
        for judge in (loss, test):
            uniformly = applied_loss(digits_model, found, same, judge)
            allocated = applied_loss(digits_model, found, chosen, judge)
            assert allocated < slack * uniformly or (chosen == same and allocated == uniformly)
        prepare_qat(digits_model, layers=allocated_layers(found, chosen))
        assert sum(weight.numel() for _, weight, _ in quantized_weights(digits_model)) == found.weights
        strip_qat(digits_model)


def test_an_allocation_of_a_language_model_is_applied_layer_by_layer() -> None:
    model = llama(vocab_size=64, hidden=32, layers=3, heads=4, kv_heads=2, intermediate=64, context=16).eval()
    tokens = torch.randint(64, (4, 16))

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return float(model(tokens, labels=tokens).loss)

    found = measure_sensitivity(model, CANDIDATES, loss)
    for bits in (4.0, 5.0, 6.0):
        chosen = allocate(found, average_bits=bits)
        assert totals(found, chosen)[0] <= bits * found.weights / 8
        assert applied_loss(model, found, chosen, loss) != found.loss
    assert loss(model) == found.loss


def test_a_candidate_that_does_not_fit_is_left_out_of_that_layer_and_said() -> None:
    model, x = nn.Sequential(nn.Linear(128, 24), nn.Linear(24, 4)), torch.randn(4, 128)
    candidates = {"W4A16": scheme("W4A16"), "W8A8": scheme("W8A8")}
    found = measure_sensitivity(model, candidates, lambda model: float(model(x).square().mean()))
    assert [list(group.options) for group in found.groups] == [["W4A16", "W8A8"], ["W8A8"]]
    (said,) = found.left_out
    assert said.startswith(
        "W4A16 is omitted: layers['1'].weight.group_size: 128 does not divide in_features=24 of layer '1'"
    )
    del candidates["W8A8"]
    with pytest.raises(QatkitError, match=r"candidates: no candidate fits layers \['1'\]"):
        measure_sensitivity(model, candidates, lambda model: 0.0)


def test_a_format_that_breaks_the_model_is_left_out() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), torch.randn(16, 8)

    def loss(model: nn.Module) -> float:
        value = float(model(x).square().mean())
        return value if len(torch.unique(model[0](x))) > 100 or not qat_layers(model) else float("inf")  # type: ignore[index]

    binary = Scheme(QuantSpec(num_bits=2, strategy="tensor"), QuantSpec(num_bits=2, strategy="tensor"))
    found = measure_sensitivity(model, {"int2": binary, "int8": CANDIDATES["int8"]}, loss, include=["0"])
    assert list(found.groups[0].options) == ["int8"]
    assert found.left_out == ("int2 is omitted: the loss is inf when it is applied to ['0']",)


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)  # type: ignore[no-any-return]


def test_what_cannot_be_measured_is_refused() -> None:
    x = torch.randn(2, 4)

    def loss(model: nn.Module) -> float:
        return float(model(x).sum())

    with pytest.raises(QatkitError, match="computing the loss never runs layer 'idle'"):
        measure_sensitivity(Idle(), CANDIDATES, loss)
    with pytest.raises(QatkitError, match="loss: the plain model has a loss of nan"):
        measure_sensitivity(Idle(), CANDIDATES, lambda model: float("nan"))
    with pytest.raises(QatkitError, match="'half' does not quantize the weight"):
        measure_sensitivity(Idle(), {"half": Scheme(None, A8)}, loss)
    with pytest.raises(QatkitError, match="candidates: no candidates were passed"):
        measure_sensitivity(Idle(), {}, loss)
    model = Idle()
    prepare_qat(model, QuantSpec(), include=["idle"])
    with pytest.raises(QatkitError, match="layer 'idle' is already fake-quantized"):
        measure_sensitivity(model, CANDIDATES, loss, include=["used"])
    assert qat_layers(model)
