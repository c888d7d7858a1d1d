"""Quotients are those of a true division on every device, so that a GPU trains with the scales that are exported."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qatkit import QuantSpec, fake_quantize, quantize, scheme
from qatkit.quantization.estimators import computed_qparams
from qatkit.quantization.scales import divided, round_scale
from tests.quantization.test_formats import SPECS


class _Divisions(TorchDispatchMode):
    """The divisors of every division."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.true_divide, torch.ops.aten.divide):
            self.seen.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", SPECS)
def test_a_divisor_lives_where_the_tensor_does_as_cuda_multiplies_by_the_reciprocal_of_any_other(
    spec: QuantSpec,
) -> None:
    x = torch.randn(64, 64, device="meta")
    with _Divisions() as divisions:
        scale, zero_point = computed_qparams(x, spec)
        fake_quantize(x, scale, zero_point, spec)
        quantize(x, scale, zero_point, spec)
        round_scale(scale, spec, torch.ones(1, device="meta"))
    assert len(divisions.seen) >= 2
    for divisor in divisions.seen:
        # by a power of two both are exact
        assert math.frexp(divisor)[0] == 0.5 if isinstance(divisor, int | float) else divisor.is_meta


def test_in_float64_a_reciprocal_gives_the_quotient_of_float32() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.rand(100_000) * size for size in (1e-6, 1.0, 100.0)])
    for number in (1, 3, 7, 7.5, 15, 31, 63, 127, 127.5, 255, 6, 28, 448, 57344):
        assert torch.equal((x.double() * (1 / number)).float(), divided(x, number))
        assert np.array_equal(divided(x, number).numpy(), x.numpy() / np.float32(number))


def test_a_learned_scale_of_mx_is_rounded_to_the_power_of_two_that_its_logarithm_is_next_to() -> None:
    spec = QuantSpec(4, strategy="group", group_size=32, type="float", scale_dtype="float8_e8m0fnu")
    size = torch.cat([torch.logspace(-40, 39, 10_001), torch.tensor([2.0**0.5, 1.5, 1.0, 1e-45])])
    wide = size.double().clamp(2.0**-126, 2.0**127).numpy()
    assert np.array_equal(round_scale(size, spec).double().numpy(), 2.0 ** np.round(np.log2(wide)))


@pytest.mark.medium
def test_compiled_scales_and_values_are_those_of_eager_torch() -> None:
    spec, x = QuantSpec(4, strategy="group", group_size=32), torch.randn(64, 256)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return fake_quantize(x, *computed_qparams(x, spec), spec)

    assert torch.equal(torch.compile(rounded)(x), rounded(x))


def test_a_power_of_two_scale_that_is_nan_stays_nan() -> None:
    spec = scheme("MXFP4").weight
    assert spec is not None
    found = round_scale(torch.tensor([float("nan"), 3.0]), spec)
    assert found[0].isnan()
    assert found[1] == 4.0
