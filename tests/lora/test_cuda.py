"""Adapters over frozen weights of few bits on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qatkit.lora.attachment import Adapter, attach, merge, to_full_precision
from qatkit.lora.bits import check_backend, dequantized, kind_of, quantize_base
from tests.lora.test_bits import FORMATS, moved, network

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("bits", "quant_type", "double_quant"), FORMATS)
def test_a_model_that_is_on_the_gpu_is_packed_and_comes_back_to_the_cpu_with_its_values(
    bits: int, quant_type: str, double_quant: bool
) -> None:
    check_backend(torch.device("cuda"))
    dense = network()
    model = copy.deepcopy(dense).cuda()
    quantize_base(model, ["0", "2"], bits, quant_type, double_quant)  # type: ignore[arg-type]
    model(torch.randn(4, 64, device="cuda"))
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        assert kind_of(layer) == bits
        assert layer.weight.dtype == (torch.uint8 if bits == 4 else torch.int8)
        there = dequantized(layer).weight
        assert there.is_cuda
        weight = dense.get_submodule(name).weight
        assert (there.cpu() - weight).norm() < (0.12 if bits == 4 else 0.01) * weight.norm()
        here = dequantized(copy.deepcopy(layer).cpu()).weight
        torch.testing.assert_close(here, there.cpu(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("bits", "quant_type", "double_quant"), FORMATS)
@pytest.mark.parametrize("dora", [False, True])
def test_the_merge_computes_what_the_adapters_did_on_the_gpu(
    bits: int, quant_type: str, double_quant: bool, dora: bool
) -> None:
    if dora and bits == 8:
        pytest.skip("refused: peft does not train it")
    model, x = network(), torch.randn(9, 64, device="cuda")
    quantize_base(model, ["0", "2"], bits, quant_type, double_quant)  # type: ignore[arg-type]  # on the CPU, as in setup
    attach(model, ["0", "2"], Adapter(4, 8, dora=dora))
    model.cuda()
    moved(model)
    trained = model(x)
    trained.square().mean().backward()
    assert all(p.grad is not None and p.grad.is_cuda for n, p in model.named_parameters() if "lora_" in n)
    model.cpu()  # as Lightning leaves it
    to_full_precision(model)
    merge(model)
    assert type(model[0]) is nn.Linear
    error = (model(x.cpu()) - trained.detach().cpu()).norm() / trained.detach().cpu().norm()
    assert error < (1e-5 if bits == 4 else 2e-2)  # of 8 bits bitsandbytes rounds the inputs as well
