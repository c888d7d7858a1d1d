"""The roofline: closed forms, textbook numbers and another library's counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchinfo
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2Model, GptOssConfig, LlamaConfig, LlamaForCausalLM

from qatkit.advise.devices import DEVICES, Device
from qatkit.advise.local import local_device
from qatkit.advise.phases import language_phases
from qatkit.advise.roofline import (
    TECHNIQUES,
    LayerCost,
    Technique,
    bound_of,
    call_seconds,
    in_caches,
    layer_costs,
    seconds,
    training,
)
from qatkit.models import resnet
from tests.cli.in_process import qatkit

A100 = DEVICES["a100"]
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


@pytest.fixture(scope="module")
def llama_7b() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**LLAMA_7B, vocab_size=32000)).eval()


def test_a_transformer_layer_has_the_operations_of_the_closed_form() -> None:
    """24 n d^2 for the products with weights and 4 n^2 d for both products of attention, without causal saving."""
    d, n = 128, 48
    with torch.device("meta"):
        model = GPT2Model(GPT2Config(n_embd=d, n_layer=1, n_head=4, vocab_size=100, n_positions=64)).eval()
        ids, mask = torch.zeros(1, n, dtype=torch.long), torch.zeros(1, 1, n, n)
        layers = layer_costs(model, lambda: model(input_ids=ids, attention_mask=mask, use_cache=False))
    assert sum(layer.flops for layer in layers) == 24 * n * d**2 + 4 * n**2 * d
    assert next(layer.flops for layer in layers if layer.name == "h.0.attn") == 4 * n**2 * d


def test_linear_and_convolution_layers_have_the_operations_that_torchinfo_counts() -> None:
    model, x = resnet((8, 16)).eval(), torch.zeros(2, 1, 16, 16)
    ours = {layer.name: layer.flops for layer in layer_costs(model, lambda: model(x)) if layer.flops}
    summary = torchinfo.summary(model, input_data=x, verbose=0)
    names = {id(module): name for name, module in model.named_modules()}
    theirs = {
        names[info.layer_id]: 2 * info.macs
        for info in summary.summary_list
        if isinstance(info.module, nn.Conv2d | nn.Linear)
    }
    # torchinfo counts the addition of a bias too: one per output
    theirs["3"] -= 2 * 2 * 10
    assert ours == theirs


def test_a_product_with_a_vector_has_one_operation_per_byte_in_16_bits() -> None:
    layer = nn.Linear(4096, 4096, bias=False, device="meta")
    (cost,) = layer_costs(layer, lambda: layer(torch.zeros(1, 4096, device="meta")))
    assert cost.intensity("bf16") == pytest.approx(1, rel=1e-3)
    assert bound_of(cost, A100, "bf16") == "memory"


def test_decoding_with_7b_parameters_on_an_a100_takes_7_ms_of_reading_and_0_04_ms_of_arithmetic(
    llama_7b: nn.Module,
) -> None:
    decode = language_phases(llama_7b, batch=1, context=1)["decode"]
    assert sum(seconds(layer, A100, "bf16") for layer in decode) == pytest.approx(7e-3, rel=0.1)
    assert sum(layer.flops for layer in decode) / 312e12 == pytest.approx(0.04e-3, rel=0.1)
    assert {bound_of(layer, A100, "bf16") for layer in decode} == {"memory"}


def test_the_cache_is_read_by_every_decoded_token(llama_7b: nn.Module) -> None:
    short, long = (language_phases(llama_7b, 2, context)["decode"] for context in (1, 1000))
    # keys and values of 32 layers with 4096 elements per token, in 2 sequences
    assert sum(layer.stored for layer in long) == 2 * 32 * 4096 * 1000 * 2
    products = [sum(layer.flops for layer in phase) for phase in (short, long)]
    # each token is multiplied with the keys and summed over the values of the context
    assert products[1] - products[0] == 4 * 4096 * 32 * 999 * 2


def test_tied_weights_count_once_and_are_read_by_both_layers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(x))

    model = Tied()
    table, head = layer_costs(model, lambda: model(torch.tensor([[1, 2]])))
    assert (table.weights, table.read) == (40, 2 * 4)  # two rows
    assert (head.weights, head.read) == (0, 40)


def test_techniques_change_bytes_or_rates_by_their_definition() -> None:
    layer = nn.Linear(8192, 8192, bias=False, device="meta")
    (one,) = layer_costs(layer, lambda: layer(torch.zeros(1, 8192, device="meta")))
    (many,) = layer_costs(layer, lambda: layer(torch.zeros(16384, 8192, device="meta")))
    ratios = {
        each.name: [seconds(cost, A100, "bf16") / seconds(cost, A100, "bf16", each) for cost in (one, many)]
        for each in TECHNIQUES
        if each.name != "FP8"
    }
    expected = {
        "W8A16": (2, 1), "W4A16": (16 / 4.125, 1), "W8A8": (2, 2), "2:4": (16 / 9, 2), "half of the neurons": (2, 2),
    }  # fmt: skip
    for name, (decode, prefill) in expected.items():
        assert ratios[name] == [pytest.approx(decode, rel=0.01), pytest.approx(prefill, rel=0.01)], name


def test_a_training_step_has_three_products_per_layer() -> None:
    layer = nn.Linear(64, 32, bias=False)
    (forward,) = layer_costs(layer, lambda: layer(torch.zeros(16, 64)))
    (step,) = training([forward])
    assert step.flops == 3 * 2 * 16 * 64 * 32
    assert step.intensity("fp32") == forward.intensity("fp32")
    assert seconds(step, A100, "fp32", Technique("none")) == pytest.approx(3 * seconds(forward, A100, "fp32"))


def test_the_cache_of_attention_with_parameters_of_its_own_is_read_too() -> None:
    """GPT-OSS has a learned sink per head."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 2,
        "vocab_size": 100,
        "num_experts_per_tok": 1,
    }
    with torch.device("meta"):
        config = GptOssConfig(**shape, **sizes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    decode = language_phases(model, 1, 1000)["decode"]
    assert sum(layer.stored for layer in decode) == 2 * 2 * 2 * 16 * 1000


def test_techniques_for_weights_leave_the_products_of_attention_as_they_are(llama_7b: nn.Module) -> None:
    prefill = language_phases(llama_7b, 1, 256)["prefill"]
    attention = next(layer for layer in prefill if layer.between_activations)
    assert attention.name == "model.layers.0.self_attn"
    times = {seconds(attention, A100, "bf16", each) for each in TECHNIQUES if each.name != "FP8"}
    assert times == {seconds(attention, A100, "bf16")}


def test_parameters_of_a_layer_that_is_called_as_a_function_count() -> None:
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
        found = layer_costs(layer, lambda: layer(torch.zeros(2, 8, 64)))
    assert sum(cost.weights for cost in found) == sum(weight.numel() for weight in layer.parameters())


def test_this_machine_is_measured() -> None:
    device = local_device(threads=1)
    assert set(device.rates) == {"fp32", "bf16", "int8"}
    assert all(rate > 1e-3 for rate in device.rates.values())
    assert device.bandwidth > 0.1
    assert [size for size, _ in device.caches] == sorted(size for size, _ in device.caches)
    assert all(rate >= device.bandwidth for _, rate in device.caches)
    assert 0 < device.operator < device.call < 1e-2


def test_weights_that_fit_into_a_cache_are_read_at_its_bandwidth_and_overheads_are_added() -> None:
    cost = LayerCost("a", "Linear", 1000, 1000, 2000, 0)  # 4000 bytes in fp32, 1000 in int8
    slow = Device("d", None, 1, 1.0, {"fp32": 1.0, "int8": 1.0}, "", caches=((2000, 4.0), (8000, 2.0)))
    assert in_caches(slow, [cost], "fp32").bandwidth == 2.0
    assert in_caches(slow, [cost] * 2, "fp32").bandwidth == 2.0
    assert in_caches(slow, [cost] * 3, "fp32").bandwidth == 1.0
    assert in_caches(slow, [cost], "fp32", Technique("W8A8", 8, "int8")).bandwidth == 4.0
    late = replace(slow, call=1e-3, operator=1e-4)
    assert call_seconds([cost] * 2, late, "fp32") == pytest.approx(1e-3 + 2 * (1e-4 + 4000 / 2e9))
    assert call_seconds([cost] * 2, replace(slow, caches=()), "fp32") == pytest.approx(2 * 4000 / 1e9)


def test_a_recipe_and_a_config_are_profiled_without_weights(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100} | {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4
    }  # fmt: skip
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    done = qatkit("profile", "model", "--device", "h100", "--context", "16", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    content = json.loads(done.out)
    assert list(content["phases"]) == ["prefill", "decode", "training"]
    assert content["speedup"]["W4A16"]["decode"] > 1
    decode = content["phases"]["decode"]
    assert content["seconds"]["decode"] == pytest.approx(sum(layer["seconds"] for layer in decode))
    done = qatkit("profile", "vision/digits_int8", "--device", "raspberry-pi-5", "--batch", "4", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "0.154 TFLOP/s in fp32, 17.1 GB/s" in done.out
    assert "forward: at least" in done.out
    assert "conv1" in done.out
    (total,) = (line for line in done.out.splitlines() if "total" in line)
    assert "100.0%" in total


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "a10"), "--device: unknown device 'a10'"),
        (("--device", "a100", "--dtype", "fp8"), "'a100' has no rate for fp8; use one of: fp32, bf16, int8"),
        (("--device", "a100", "--dtype", "fp64"), "--dtype: unknown dtype 'fp64'"),
    ],
)
def test_unknown_devices_and_dtypes_are_refused(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = qatkit("profile", "vision/digits_int8", *arguments, cwd=tmp_path)
    assert done.code == 2
    assert message in done.err


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    done = qatkit("profile", ".", "--device", "a100", cwd=tmp_path)
    assert done.code == 2
    assert "transformers cannot build a causal language model from this folder" in done.err


def test_overrides_of_a_config_are_refused(tmp_path: Path) -> None:
    done = qatkit("profile", ".", "model.args.hidden=8", "--device", "a100", cwd=tmp_path)
    assert done.code == 2
    assert "model.args.hidden=8: a config has no recipe keys to override" in done.err
