"""Frozen weights of 4 and 8 bits: never repacked, restored from checkpoints, and left at full precision."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import modules as bnb_modules
from torch import nn

from qatkit import QatkitError
from qatkit.lora.attachment import Adapter, adapted_layers, attach, merge
from qatkit.lora.bits import check_backend, dequantized, make_safe, quantize_base

FORMATS = [(4, "nf4", True), (4, "nf4", False), (4, "fp4", True), (8, "nf4", True)]


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))


def quantized(bits: int = 4, quant_type: str = "nf4", double_quant: bool = True) -> nn.Sequential:
    model = network()
    quantize_base(model, ["0", "2"], bits, quant_type, double_quant)  # type: ignore[arg-type]
    return model


def moved(model: nn.Module) -> nn.Module:
    """As if it had been trained."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize(("bits", "quant_type", "double_quant"), FORMATS)
@pytest.mark.parametrize("dora", [False, True])
def test_the_merge_goes_into_the_dequantized_base_and_computes_what_the_adapters_did(
    bits: int, quant_type: str, double_quant: bool, dora: bool
) -> None:
    if dora and bits == 8:
        pytest.skip("refused: peft does not train it")
    model, x = quantized(bits, quant_type, double_quant), torch.randn(9, 64)
    base = {name: dequantized(model.get_submodule(name)).weight for name in ("0", "2")}
    attach(model, ["0", "2"], Adapter(4, 8, dora=dora))
    before = model(x)
    moved(model)
    trained = model(x)
    merge(model)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.dtype == torch.float32
    torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)
    assert (trained - before).abs().max() > 1e-2
    assert not torch.equal(model[0].weight, base["0"])
    assert len(model[0].weight.unique()) > 1000, "rounded back to few bits, far fewer values would be left"


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("dora", [False, True])
def test_over_a_base_of_16_bits_factors_have_32_and_what_is_merged_runs_in_16(bits: int | None, dora: bool) -> None:
    if dora and bits == 8:
        pytest.skip("refused: peft does not train it")
    model, x = network().bfloat16(), torch.randn(9, 64, dtype=torch.bfloat16)
    if bits is not None:
        quantize_base(model, ["0", "2"], bits)  # type: ignore[arg-type]
    attach(model, ["0", "2"], Adapter(4, 8, dora=dora))
    moved(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    trained = model(x)
    assert trained.dtype == torch.bfloat16
    merge(model)
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    torch.testing.assert_close(model(x), trained, rtol=0.05, atol=0.02)


def test_double_quantization_and_the_grids_are_those_of_bitsandbytes() -> None:
    for bits, quant_type, double_quant in FORMATS[:3]:
        weight = network()[0].weight
        assert isinstance(weight, torch.Tensor)
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight.data, compress_statistics=double_quant, quant_type=quant_type
        )
        expected = bitsandbytes.functional.dequantize_4bit(packed, state)
        assert torch.equal(dequantized(quantized(bits, quant_type, double_quant)[0]).weight, expected)


def test_no_layer_is_repacked_where_the_processor_would_invite_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb_modules, "has_avx512bf16", lambda: True)
    theirs = bitsandbytes.nn.Linear4bit(64, 64)
    assert theirs.support_avx512bf16_for_cpu, "else this test shows nothing"
    model = quantized()
    packed = model[0].weight.data.clone()
    with torch.no_grad():
        model.eval()(torch.randn(4, 64))
    assert torch.equal(model[0].weight.data, packed)
    # and a model that somebody else has loaded in 4 bits
    loaded = nn.Sequential(theirs)
    attach(loaded, ["0"], Adapter(2))
    assert make_safe(loaded) == ["0.base_layer"]
    assert not theirs.support_avx512bf16_for_cpu


@pytest.mark.parametrize("bits", [4, 8])
def test_a_state_dict_brings_back_another_base_even_after_the_layer_has_run(bits: int) -> None:
    model, x = quantized(bits), torch.randn(9, 64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(x)
    torch.manual_seed(9)
    other = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))
    quantize_base(other, ["0", "2"], bits)  # type: ignore[arg-type]
    assert not torch.allclose(other(x), expected, atol=1e-2)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(x), expected)


def test_an_8_bit_layer_multiplies_by_what_a_move_to_a_device_has_put_into_its_weight() -> None:
    fresh, ran, x = quantized(8), quantized(8), torch.randn(9, 64)
    expected = ran(x)
    for model in (fresh, ran):
        for layer in (model[0], model[2]):
            own = layer.weight  # a move keeps the parameter and changes the tensor in it
            layer._apply(lambda tensor: torch.zeros_like(tensor))
            assert layer.weight is own
        assert not model(x).any()
    assert expected.any()


def test_adapters_alone_are_trained_over_few_bits() -> None:
    model = quantized()
    attach(model, ["0"], Adapter(rank=4))
    assert list(adapted_layers(model)) == ["0"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * (64 + 96)


def test_a_device_without_a_backend_is_refused_with_what_to_write() -> None:
    check_backend(torch.device("cpu"))
    with pytest.raises(QatkitError, match=r"bits: bitsandbytes cannot quantize on meta .*set bits: null"):
        check_backend(torch.device("meta"))
