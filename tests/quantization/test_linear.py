"""The product of a quantized linear layer: the values and gradients of `F.linear`, with less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit import QuantSpec, calibrate, prepare_qat
from qatkit.quantization.layers import QATLinear

GROUPS = QuantSpec(4, strategy="group", group_size=32)
LEARNED = QuantSpec(4, strategy="group", group_size=32, observer="lsq")
TOKEN = QuantSpec(8, strategy="token")
SPECS: dict[str, tuple[QuantSpec | None, QuantSpec | None]] = {
    "W4A16": (GROUPS, None),
    "W16A8": (None, TOKEN),
    "W4A8": (GROUPS, QuantSpec(8, symmetric=False, strategy="token")),
    "LSQ, A8": (LEARNED, TOKEN),
    "LSQ+": (QuantSpec(4, symmetric=False, observer="lsq_plus"), None),
    "static inputs": (QuantSpec(8, observer="mse"), QuantSpec(8, symmetric=False, strategy="tensor")),
    "learned inputs": (QuantSpec(4), QuantSpec(8, strategy="tensor", observer="lsq")),
    "FP8": (QuantSpec(8, type="float"), QuantSpec(8, type="float", strategy="token")),
    "FP4": (QuantSpec(4, type="float", strategy="group", group_size=32),) * 2,
}


def made(specs: tuple[QuantSpec | None, QuantSpec | None], bias: bool, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A calibrated network, and an input with values beyond the calibrated range."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=bias), nn.GELU(), nn.Linear(96, 32, bias=bias)).to(dtype)
    prepare_qat(model, *specs)
    x = torch.randn(2, 4, 64).to(dtype)
    calibrate(model, [x * 0.7])
    return model, x


class Reference(QATLinear):
    """The same layer with torch's product of the fake-quantized tensors."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(*self.operands(input))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_outputs_and_gradients_are_those_of_torch_s_product(
    specs: tuple[QuantSpec | None, QuantSpec | None], bias: bool, dtype: torch.dtype, autocast: bool
) -> None:
    model, x = made(specs, bias, dtype)
    reference = copy.deepcopy(model)
    for index in (0, 2):
        reference[index].__class__ = Reference  # type: ignore[index]
    found: list[list[Any]] = []
    for each in (model, reference):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = each(own)
        y.float().square().sum().backward()
        found.append([y, own.grad, *(parameter.grad for parameter in each.parameters())])
    assert [type(each) for each in found[0]] == [type(each) for each in found[1]]
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def kept(model: nn.Module, x: Tensor) -> int:
    """The bytes that one forward pass keeps for the backward pass, with the parameters but without the input."""
    tensors = [*model.parameters()]

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    storages.pop(x.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize(
    ("specs", "most"),
    [
        (SPECS["W4A16"], 1.04),  # one float32 scale and zero point per 32 weights
        ((LEARNED, None), 1.10),  # the scale twice, its rounded values and a zero point
        ((QuantSpec(8), TOKEN), 0.71),
        (SPECS["static inputs"], 0.85),  # a mask of values in range, one byte each
    ],
    ids=["W4A16", "LSQ", "W8A8", "static W8A8"],
)
def test_little_more_than_the_parameters_and_codes_are_kept(
    specs: tuple[QuantSpec | None, QuantSpec | None], most: float
) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False))
    model, x = copy.deepcopy(plain), torch.randn(1024, 256)
    prepare_qat(model, *specs)
    calibrate(model, [x])
    assert kept(model, x) <= most * kept(plain, x)


def test_a_weight_that_is_changed_before_the_backward_pass_is_an_error_as_in_torch() -> None:
    model, x = made(SPECS["W4A8"], True, torch.float32)
    loss = model(x.requires_grad_()).sum()
    with torch.no_grad():
        model[2].weight.add_(1)  # type: ignore[index, union-attr, operator]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_output_may_be_changed_in_place_as_in_torch() -> None:
    model, x = made(SPECS["W4A8"], True, torch.float32)
    first, last = model[0](x), model(x)  # type: ignore[index, operator]
    first.relu_()
    last += 1
    (first.sum() + last.sum()).backward()
    assert model[0].weight.grad is not None  # type: ignore[index, union-attr]


def test_a_frozen_weight_and_an_input_without_batch_have_gradients() -> None:
    model, x = made(SPECS["W4A8"], True, torch.float32)
    model.requires_grad_(False)
    own = x[0, 0].clone().requires_grad_()
    model(own).sum().backward()
    assert own.grad is not None
    assert own.grad.abs().sum() > 0
