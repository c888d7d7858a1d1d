"""The integer arithmetic against torch's own operators, float64 closed forms and textbook examples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qatkit import QatkitError, QuantSpec, choose_qparams, dequantize, fake_quantize, quantize, scheme
from qatkit.quantization.arithmetic import exact_codes
from qatkit.quantization.slices import value_range

SPECS = [
    QuantSpec(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=8 if strategy == "group" else None)
    for bits in range(2, 9)
    for symmetric in (True, False)
    for strategy in ("tensor", "channel", "group", "token")
]


def minmax(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    return choose_qparams(*value_range(x, spec), spec)


def test_the_textbook_example_in_8_bits_asymmetric_has_its_textbook_scale_and_codes() -> None:
    x = torch.tensor([0.5, 1.2, -0.3, 0.8])
    spec = QuantSpec(num_bits=8, symmetric=False, strategy="tensor")
    scale, zero_point = minmax(x, spec)
    assert scale.item() == pytest.approx(1.5 / 255, rel=1e-6)
    assert quantize(x, scale, zero_point, spec).tolist() == [136, 255, 0, 187]


def test_the_textbook_row_in_groups_of_4_at_4_bits_has_its_textbook_scales() -> None:
    row = torch.tensor([[0.1, 0.2, 0.15, 0.12, 2.0, -1.8, 1.5, -2.1]])
    scale, _ = minmax(row, QuantSpec(num_bits=4, strategy="group", group_size=4))
    assert scale.tolist() == [[pytest.approx(0.2 / 7, rel=1e-6), pytest.approx(0.3, rel=1e-6)]]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_quantize_is_dequantize_of_quantize_bit_for_bit(spec: QuantSpec, dtype: torch.dtype) -> None:
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale, zero_point = minmax(x, spec)
    scale = scale * 0.7  # so that some values are clipped
    codes = quantize(x, scale, zero_point, spec)
    assert codes.min() >= spec.qmin
    assert codes.max() <= spec.qmax
    for clips in (True, False):
        assert torch.equal(
            fake_quantize(x, scale, zero_point, spec, clips=clips), dequantize(codes, scale, zero_point, spec).to(dtype)
        )


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    values=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=8, max_size=8),
    scale_dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)
@settings(max_examples=200, deadline=None)
def test_zero_stays_zero_and_scales_stay_positive_whatever_the_values(
    bits: int, symmetric: bool, values: list[float], scale_dtype: str
) -> None:
    spec = QuantSpec(bits, symmetric, strategy="tensor", scale_dtype=scale_dtype)  # type: ignore[arg-type]
    x = torch.tensor(values)
    scale, zero_point = minmax(x, spec)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert torch.equal(scale, scale.to(getattr(torch, scale_dtype)).float())
    assert fake_quantize(torch.zeros(1), scale, zero_point, spec).item() == 0
    codes = quantize(x, scale, zero_point, spec).int()
    assert codes.min() >= spec.qmin
    assert codes.max() <= spec.qmax


def test_codes_are_those_of_torch_per_tensor_where_division_is_exact() -> None:
    # torch multiplies by 1/scale and we divide, as ONNX does: a power of two makes the two the same number
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(1)) * 3
    for symmetric, zero_point in ((True, 0), (False, 97)):
        spec = QuantSpec(8, symmetric, strategy="tensor")
        ours = fake_quantize(x, torch.tensor([2.0**-6]), torch.tensor([float(zero_point)]), spec)
        theirs = torch.fake_quantize_per_tensor_affine(x, 2.0**-6, zero_point, spec.qmin, spec.qmax)
        assert torch.equal(ours, theirs)


def test_values_are_those_of_torch_per_channel_except_on_a_rounding_border() -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    spec = QuantSpec(4)
    scale, zero_point = minmax(w, spec)
    ours = fake_quantize(w, scale, zero_point, spec)
    theirs = torch.fake_quantize_per_channel_affine(
        w, scale.flatten(), zero_point.flatten().int(), 0, spec.qmin, spec.qmax
    )
    border = ((w / scale).abs() % 1 - 0.5).abs() < 1e-5
    assert torch.equal(ours[~border], theirs[~border])
    assert border.float().mean() < 1e-3


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_the_closed_form_of_lsq_in_float64(symmetric: bool) -> None:
    spec = QuantSpec(4, symmetric)
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(3)).mul(2).requires_grad_()
    scale = torch.rand(8, 1, generator=torch.Generator().manual_seed(4)).mul(0.2).add(0.1).requires_grad_()
    zero_point = torch.zeros(8, 1) if symmetric else torch.arange(8.0).view(8, 1)
    out_grad = torch.randn(8, 40, generator=torch.Generator().manual_seed(5))
    fake_quantize(x, scale, zero_point, spec, gradient_scale=0.25).backward(out_grad)

    v = x.detach().double() / scale.detach().double()
    low, high = spec.qmin - zero_point.double(), spec.qmax - zero_point.double()
    inside = (v >= low) & (v <= high)
    slope = torch.where(inside, v.round() - v, v.clamp(low, high))
    expected = (out_grad.double() * slope).sum(dim=1, keepdim=True) * 0.25
    assert torch.equal(x.grad, torch.where(inside, out_grad, 0))  # type: ignore[arg-type]
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_scale_gradient_agrees_with_torch_learnable_fake_quantize_off_the_border() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(6))
    scale = torch.full((1,), 0.11)
    spec = QuantSpec(4, strategy="tensor")
    # torch counts the half step beyond the last code as inside the range, the LSQ paper as clipped: leave it out
    v = x / scale
    x = x[((v >= spec.qmin) & (v <= spec.qmax)) | (v < spec.qmin - 0.5) | (v > spec.qmax + 0.5)]
    ours, theirs = scale.clone().requires_grad_(), scale.clone().requires_grad_()
    fake_quantize(x, ours, torch.zeros(1), spec).sum().backward()
    torch._fake_quantize_learnable_per_tensor_affine(
        x, theirs, torch.zeros(1), spec.qmin, spec.qmax, 1.0
    ).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-3)


def test_an_all_zero_channel_gets_the_widest_scale_and_an_all_zero_tensor_gets_one() -> None:
    spec = QuantSpec(8)
    scale, _ = minmax(torch.tensor([[0.0, 0.0], [1.0, -2.0]]), spec)
    assert scale.flatten().tolist() == [pytest.approx(2 / 127), pytest.approx(2 / 127)]
    scale, _ = minmax(torch.zeros(2, 2), spec)
    assert scale.flatten().tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_bits": 9}, "num_bits: 9 is out of range for type 'int'; use 2 to 8"),
        ({"num_bits": 1}, "num_bits: 1 is out of range"),
        ({"strategy": "group"}, "group_size: strategy 'group' requires a positive integer, not None; use 32"),
        (
            {"group_size": 32},
            "group_size: 32 has no effect with strategy 'channel'; set strategy: group, or remove group_size",
        ),
        ({"observer": "lqs"}, "observer: unknown observer 'lqs'; did you mean 'lsq'"),
        ({"num_bits": "4"}, "num_bits: '4' is not an integer"),
        ({"symmetric": "false"}, "symmetric: 'false' is not a boolean; use true or false"),
        ({"strategy": "group", "group_size": "32"}, "group_size: '32' is not an integer; use an integer such as 32"),
        (
            {"strategy": "token", "observer": "lsq"},
            "observer: 'lsq' is not supported with strategy 'token', .*; use minmax",
        ),
    ],
)
def test_an_invalid_spec_raises_an_error_with_the_fix(fields: dict[str, object], message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        QuantSpec(**fields)  # type: ignore[arg-type]


def test_exact_codes_are_those_before_rounding_with_a_zero_point_and_with_a_minimum() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, -1.0, 6.0, 9.0]])
    scale, zero_point = torch.tensor([[0.5, 2.0], [1.0, 3.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    groups = QuantSpec(4, symmetric=False, strategy="group", group_size=2)
    codes = exact_codes(x, scale, zero_point, groups)  # x / scale + zero point
    assert codes.tolist() == [[[3.0, 5.0], [3.5, 4.0]], [[3.0, 2.0], [6.0, 7.0]]]
    signed = exact_codes(x, torch.tensor([[0.5], [2.0]]), torch.zeros(2, 1), QuantSpec(4))
    assert signed.flatten().tolist() == [2.0, 4.0, 6.0, 8.0, 0.0, -0.5, 3.0, 4.5]
    own = scheme("Q4_K").weight
    assert own is not None
    block = torch.full((1, 256), 3.0)
    minima = exact_codes(block, torch.full((1, 8), 0.5), torch.full((1, 8), 2.0), own)  # (x + minimum) / scale
    assert minima.unique().tolist() == [10.0]
