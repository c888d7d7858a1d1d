"""Block sums of inputs in float16, as llama.cpp computes with weights that have a minimum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qatkit import QuantSpec, prepare_qat, scheme
from qatkit.quantization.arithmetic import quantize


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
@pytest.mark.parametrize("kind", ["linear", "transposed"])
def test_a_layer_computes_the_dot_products_of_llama_cpp(name: str, kind: str) -> None:
    """Per block: ``d4 d8 sum(q4 q8) + m s8``, where s8 is the sum of the inputs as a float16 number (q8_1)."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 128) * torch.logspace(-2, 2, 5)[:, None] + 1
    layer: Any = nn.Linear(128, 24) if kind == "linear" else Conv1D(24, 128)
    model, own = nn.Sequential(layer), scheme(f"{name}_A8")
    assert own.weight is not None
    prepare_qat(model, own.weight, own.activation)
    found = model(x)
    scale, zero_point = layer.weight_fake_quant.whole_qparams(layer.matrix)
    codes = quantize(layer.matrix, scale, zero_point, own.weight)
    blocks = x.view(3, 5, 4, 32)
    step = blocks.abs().amax(-1) / 127
    inputs = (blocks / step[..., None]).round()
    products = torch.einsum("abgi,ogi->abog", inputs.double(), codes.double().view(24, 4, 32))
    expected = (products * step.half().double()[:, :, None] * scale.double()).sum(-1) + layer.bias
    minima = (-scale * zero_point).half().double()
    exact = expected + (inputs.sum(-1).double() * step.half()) @ minima.t()
    expected = expected + (inputs.sum(-1) * step).half().double() @ minima.t()
    size = expected.abs().amax(-1, keepdim=True)
    assert ((found - expected).abs() / size).max() < 1e-6
    assert ((found - exact).abs() / size).max() > 1e-4


def test_the_gradient_ignores_the_rounding_of_the_sums() -> None:
    torch.manual_seed(0)
    x, gradients = torch.randn(4, 64), []
    for activation in (scheme("Q4_1_A8").activation, QuantSpec(8, strategy="token")):
        torch.manual_seed(1)
        model: Any = nn.Sequential(nn.Linear(64, 8))
        prepare_qat(model, scheme("Q4_1").weight, activation)
        given = x.clone().requires_grad_()
        model(given).sum().backward()
        gradients.append(given.grad)
    assert torch.equal(*gradients)
