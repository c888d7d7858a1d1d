"""Importance from weights equals explicit sums, and the slope of the loss when a part is scaled down."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from qatkit import QatkitError
from qatkit.models import cnn
from qatkit.pruning.channel_importance import channel_scores, last_layer, taylor_channel_scores
from qatkit.pruning.structure import Shape, shrink
from qatkit.pruning.weight_importance import magnitude_importance, taylor_importance


def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def batches() -> list[Tensor]:
    return [torch.randint(24, (2, 6), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def loss(model: Any, tokens: Tensor) -> Tensor:
    found: Tensor = model(tokens, labels=tokens).loss
    return found


def scaled(dense: Any, part: tuple[str, int, int], gate: Tensor) -> dict[str, Tensor]:
    """The weights of a model where all those of one part are multiplied by `gate`."""
    kind, layer, number = part
    weights = {name: value.detach().clone() for name, value in dense.named_parameters()}
    prefix = f"model.layers.{layer}."
    rows = {"neuron": ("mlp.gate_proj", "mlp.up_proj"), "head": ("self_attn.q_proj",), "layer": ()}[kind]
    columns = {"neuron": ("mlp.down_proj",), "head": ("self_attn.o_proj",), "layer": ()}[kind]
    width = {"neuron": 1, "head": 4, "layer": 1}[kind]
    chosen = slice(number * width, (number + 1) * width)
    for name in list(weights):
        if kind == "layer" and name.startswith(prefix):
            weights[name] = weights[name] * gate
        mask = torch.zeros_like(weights[name])
        if any(name == f"{prefix}{row}.weight" for row in rows):
            mask[chosen] = 1
        if any(name == f"{prefix}{column}.weight" for column in columns):
            mask[:, chosen] = 1
        weights[name] = weights[name] * (1 + mask * (gate - 1))
    if kind == "head":  # a query has its share of the keys and values that it reads
        group = slice(number // 2 * 4, (number // 2 + 1) * 4)
        for name in (f"{prefix}self_attn.k_proj.weight", f"{prefix}self_attn.v_proj.weight"):
            mask = torch.zeros_like(weights[name])
            mask[group] = 0.5
            weights[name] = weights[name] * (1 + mask * (gate - 1))
    return weights


@pytest.mark.parametrize("part", [("neuron", 0, 3), ("neuron", 1, 11), ("head", 0, 1), ("head", 1, 2), ("layer", 1, 0)])
def test_taylor_is_the_squared_slope_of_the_loss_when_a_part_is_turned_down(part: tuple[str, int, int]) -> None:
    dense = model()
    scores = taylor_importance(dense, batches(), lambda tokens: loss(dense, tokens))
    slopes = []
    exact = model().double()
    for tokens in batches():
        gate = torch.ones((), dtype=torch.float64, requires_grad=True)
        output = functional_call(exact, scaled(exact, part, gate), (tokens,), {"labels": tokens}, tie_weights=True)
        slopes.append(torch.autograd.grad(output.loss, gate)[0])
    kind, layer, number = part
    found = {"neuron": scores.neurons, "head": scores.heads, "layer": scores.layers.unsqueeze(1)}[kind][layer, number]
    torch.testing.assert_close(found.double(), torch.stack(slopes).square().mean(), rtol=1e-3, atol=1e-12)


def test_magnitude_is_the_sum_of_squares_of_all_weights_of_a_part() -> None:
    dense = model()
    scores = magnitude_importance(dense)
    block = dense.model.layers[1]
    mlp = block.mlp
    neuron = mlp.gate_proj.weight[5].square().sum() + mlp.up_proj.weight[5].square().sum()
    torch.testing.assert_close(scores.neurons[1, 5], neuron + mlp.down_proj.weight[:, 5].square().sum())
    torch.testing.assert_close(scores.layers[1], sum(p.square().sum() for p in block.parameters()))
    hidden = sum(
        value.square().select(axis, 7).sum()
        for name, value in dense.named_parameters()
        for axis in ([0] if "o_proj" in name or "down_proj" in name or value.dim() == 1 else [1])
    )
    torch.testing.assert_close(scores.hidden[7], hidden)


def test_parts_with_zero_weights_are_removed_first() -> None:
    dense = model()
    dense.model.layers[0].mlp.down_proj.weight.data[:, 4] = 0
    for scores in (magnitude_importance(dense), taylor_importance(dense, batches(), lambda x: loss(dense, x))):
        small = shrink(dense, scores, Shape(neurons=11))
        assert small.config.intermediate_size == 11  # type: ignore[union-attr]
    dense.model.layers[0].mlp.gate_proj.weight.data[4] = 0
    dense.model.layers[0].mlp.up_proj.weight.data[4] = 0
    for scores in (magnitude_importance(dense), taylor_importance(dense, batches(), lambda x: loss(dense, x))):
        assert scores.neurons[0].argmin() == 4
    with pytest.raises(QatkitError, match="batches: no batches were passed"):
        taylor_importance(dense, [], lambda x: loss(dense, x))


def test_channels_are_scored_by_activation_and_by_the_slope_of_the_loss() -> None:
    torch.manual_seed(0)
    network = cnn(channels=[4, 6]).double().eval()
    image, label = torch.randn(3, 1, 8, 8).double(), torch.tensor([1, 2, 3])
    found = channel_scores(network, [image], network)
    torch.testing.assert_close(found["conv1"], network.conv1(image).abs().mean(dim=(0, 2, 3)).float())
    entropy = torch.nn.functional.cross_entropy
    found = taylor_channel_scores(network, [image], lambda x: entropy(network(x), label))
    gate = torch.ones(6, dtype=torch.float64, requires_grad=True)
    weight = network.conv2.weight.detach() * gate.view(-1, 1, 1, 1)
    output = functional_call(network, {"conv2.weight": weight}, (image,))
    (slope,) = torch.autograd.grad(entropy(output, label), gate)
    torch.testing.assert_close(found["conv2"].double(), slope.square(), rtol=1e-3, atol=1e-12)
    assert last_layer(network, image) == "classifier"
