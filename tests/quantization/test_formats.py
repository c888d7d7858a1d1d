"""Every number format against the libraries whose files and kernels hold it, given the same scale."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as ct_fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from gguf import GGMLQuantizationType
from gguf.quants import quantize as gguf_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchao.quantization.quant_primitives import choose_qparams_affine, dequantize_affine, quantize_affine

from qatkit import QatkitError, QuantSpec, dequantize, fake_quantize, quantize, scheme
from qatkit.export.gguf.packing import BLOCK_TYPES
from qatkit.quantization.estimators import computed_qparams, mse_qparams
from qatkit.quantization.scales import tensor_scale_of
from qatkit.quantization.slices import aligned, from_slices, to_slices, value_range
from qatkit.schemes import SCHEMES

ELEMENTS: list[dict[str, Any]] = [
    *({"num_bits": bits, "symmetric": symmetric} for bits in range(2, 9) for symmetric in (True, False)),
    {"num_bits": 2, "type": "ternary", "observer": "absmean"},
    {"num_bits": 4, "type": "float"},
    {"num_bits": 6, "type": "float"},
    {"num_bits": 8, "type": "float"},
    {"num_bits": 8, "type": "float_e5m2"},
]
SLICES: list[dict[str, Any]] = [
    {"strategy": "tensor"},
    {"strategy": "channel"},
    {"strategy": "group", "group_size": 8},
    {"strategy": "block", "block_structure": (5, 12)},
    {"strategy": "token"},
]
EXTRA = [
    QuantSpec(4, strategy="group", group_size=16, type="float", scale_dtype="float8_e4m3fn"),
    QuantSpec(4, strategy="group", group_size=16, type="float", scale_dtype="ue4m3"),
    QuantSpec(1, strategy="group", group_size=8, type="ternary", observer="absmean"),
    QuantSpec(4, strategy="group", group_size=32, type="float", scale_dtype="float8_e8m0fnu"),
    QuantSpec(8, strategy="group", group_size=32, type="float", scale_dtype="float8_e8m0fnu"),
    QuantSpec(4, strategy="group", group_size=32, scale_dtype="float16", scale_rule="signed"),
    QuantSpec(4, False, "group", 32, scale_dtype="float16", scale_rule="minimum"),
    QuantSpec(8, scale_rule="range"),
    QuantSpec(4, scale_rule="range", scale_dtype="bfloat16"),
]
OTHERS = {*BLOCK_TYPES, "NVFP4_UE4M3", "F16"} - {"MXFP4", "NVFP4"}
PRESETS = [name for name in SCHEMES if name not in OTHERS and not name.startswith("MLX") and "_A8" not in name]
SPECS = [
    QuantSpec(**element, **slices)
    for element, slices in itertools.product(ELEMENTS, SLICES)
    if not (slices["strategy"] == "token" and element.get("type") == "ternary")
] + EXTRA


def every_value(spec: QuantSpec) -> Tensor:
    """All codes of a format as numbers, from ml_dtypes where they are small floats."""
    if not spec.is_float:
        return torch.arange(int(spec.qmin), int(spec.qmax) + 1).float()
    kind = {4: ml_dtypes.float4_e2m1fn, 6: ml_dtypes.float6_e2m3fn, 8: ml_dtypes.float8_e4m3fn}[spec.num_bits]
    kind = ml_dtypes.float8_e5m2 if spec.type == "float_e5m2" else kind
    numbers = np.arange(1 << spec.num_bits, dtype=np.uint8).view(kind).astype(np.float32)
    return torch.from_numpy(np.unique(numbers[np.isfinite(numbers)]))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ct(name: str, part: str = "weights") -> QuantizationArgs:
    return getattr(preset_name_to_scheme(name, ["Linear"]), part)  # type: ignore[no-any-return]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_quantization_is_dequantized_codes_in_every_format_granularity_and_dtype(
    spec: QuantSpec, dtype: torch.dtype
) -> None:
    for shape in ((16, 32), (7, 96)):
        x = random(*shape).to(dtype)
        x[1] = 0
        scale, zero_point = computed_qparams(x, spec)
        assert scale.isfinite().all()
        assert (scale != 0).all()
        codes = quantize(x, scale, zero_point, spec)
        values = fake_quantize(x, scale, zero_point, spec)
        assert torch.equal(values, dequantize(codes, scale, zero_point, spec).to(dtype))
        assert not values[1].any(), "zero is zero"
        if not spec.is_float:
            assert codes.min() >= spec.qmin
            assert codes.max() <= spec.qmax
        assert torch.equal(fake_quantize(values.float(), scale, zero_point, spec).to(dtype), values), "idempotent"


@given(
    spec=st.sampled_from(SPECS),
    seed=st.integers(0, 2**31),
    size=st.floats(2.0**-20, 2.0**20),
    share=st.floats(0.01, 4.0),
)
@settings(max_examples=150, deadline=None)
def test_any_scale_gives_codes_inside_the_range_and_the_nearest_value(
    spec: QuantSpec, seed: int, size: float, share: float
) -> None:
    x = random(10, 96, seed=seed) * size
    scale, zero_point = computed_qparams(x, spec)
    scale = scale * share
    values = fake_quantize(x, scale, zero_point, spec)
    assert values.isfinite().all()
    again = dequantize(quantize(x, scale, zero_point, spec), scale, zero_point, spec)
    assert torch.equal(values, again)
    # every value that the codes stand for, from a list that does not round: none is nearer
    size_of = to_slices(torch.ones_like(x), spec) * aligned(scale, x, spec)
    v, rounded = (from_slices(to_slices(t, spec) / size_of, x.shape, spec) for t in (x, values))
    grid = every_value(spec)
    offset = from_slices(aligned(zero_point, x, spec).expand_as(size_of), x.shape, spec)
    nearest = (v.unsqueeze(-1) - (grid - offset.unsqueeze(-1))).abs().amin(dim=-1)
    # both are differences of float32 numbers, so what rounding leaves in them grows with the numbers
    assert ((v - rounded).abs() - nearest).abs().le(1e-4 + 1e-6 * v.abs()).all()


@pytest.mark.parametrize(
    ("bits", "kind", "outside"),
    [
        (4, "float", ml_dtypes.float4_e2m1fn), (6, "float", ml_dtypes.float6_e2m3fn),
        (8, "float", ml_dtypes.float8_e4m3fn), (8, "float_e5m2", ml_dtypes.float8_e5m2),
    ],
)  # fmt: skip
def test_small_floats_round_as_ml_dtypes_does_and_have_its_bits(bits: int, kind: Any, outside: Any) -> None:
    spec = QuantSpec(bits, type=kind, strategy="tensor")
    top = float(spec.qmax)
    x = torch.cat([random(20_000) * top / 3, torch.linspace(-top, top, 4001), torch.tensor([0.0, top, -top])])
    x = x.clamp(-top, top)
    one, zero = torch.ones(1), torch.zeros(1)
    theirs = x.numpy().astype(outside)
    assert torch.equal(fake_quantize(x, one, zero, spec), torch.from_numpy(theirs.astype(np.float32)))
    codes = quantize(x, one, zero, spec).view(torch.uint8).numpy()
    nonzero = theirs.astype(np.float32) != 0  # the sign of a zero has no meaning
    assert np.array_equal(codes[nonzero], theirs.view(np.uint8)[nonzero])


def our_args(spec: QuantSpec, dynamic: bool) -> dict[str, Any]:
    """A spec in compressed-tensors' words."""
    scale_dtype = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e8m0fnu": torch.uint8}.get(spec.scale_dtype)
    strategy = "tensor_group" if spec.two_level else spec.strategy
    return {
        "num_bits": spec.num_bits, "type": spec.type, "symmetric": spec.symmetric, "strategy": strategy,
        "group_size": spec.group_size, "block_structure": spec.block_structure and list(spec.block_structure),
        "scale_dtype": scale_dtype, "dynamic": ("local" if spec.two_level else True) if dynamic else False,
    }  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_scheme_says_what_compressed_tensors_preset_of_that_name_says(name: str) -> None:
    for spec, part in ((scheme(name).weight, "weights"), (scheme(name).activation, "input_activations")):
        theirs = ct(name, part)
        assert (spec is None) == (theirs is None)
        if spec is None:
            continue
        dynamic = part != "weights" and spec.strategy != "tensor"
        said = {key: getattr(theirs, key) for key in our_args(spec, dynamic)}
        for key in ("type", "strategy", "dynamic"):
            said[key] = getattr(said[key], "value", said[key])
        assert said == our_args(spec, dynamic)
    missing = set(preset_names()) - set(SCHEMES)
    assert missing == {"UNQUANTIZED"}


def preset_names() -> list[str]:
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    return list(PRESET_SCHEMES)


@pytest.mark.parametrize("name", PRESETS)
def test_a_scheme_computes_what_compressed_tensors_computes_in_float32(name: str) -> None:
    """Scales and values are equal (==). Asymmetric codes differ by 2**(bits-1): ours are unsigned, theirs signed."""
    spec = scheme(name).weight
    assert spec is not None
    w = random(192, 256)
    args = ct(name)
    low, high = value_range(w, spec)
    global_scale = generate_gparam(w.min().view(1), w.max().view(1)) if spec.two_level else None
    theirs_scale, theirs_zero = calculate_qparams(low, high, args, global_scale=global_scale)
    scale, zero_point = computed_qparams(w, spec)
    if spec.two_level:
        assert global_scale is not None
        assert torch.equal(tensor_scale_of(w.abs(), spec), global_scale)
        assert torch.equal(scale, theirs_scale.float() / global_scale)
    else:
        assert torch.equal(scale, theirs_scale.float())
    if not spec.symmetric:
        assert torch.equal(zero_point - 2 ** (spec.num_bits - 1), theirs_zero.float())
        zeros = theirs_zero
    else:
        zeros = None
    ours = fake_quantize(w, scale, zero_point, spec)
    theirs = ct_fake_quantize(w, theirs_scale.float(), zeros, args, global_scale)
    if spec.symmetric:
        assert torch.equal(ours, theirs)
    else:  # they round v + zero_point, we round v: the two differ only on a tie between two codes
        border = ((w.view(192, -1, 128) / scale.unsqueeze(-1)) % 1 - 0.5).abs().view_as(w) < 1e-4
        assert torch.equal(ours[~border], theirs[~border])


@pytest.mark.parametrize("name", ["W8A8", "FP8_DYNAMIC", "MXFP4", "MXFP8", "W4A4", "FP8_BLOCK"])
def test_a_dynamic_activation_is_what_compressed_tensors_computes_for_it(name: str) -> None:
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    spec, args = scheme(name).activation, ct(name, "input_activations")
    assert spec is not None
    x = random(3, 7, 256)
    theirs_scale, _ = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
    scale, zero_point = computed_qparams(x, spec)
    assert torch.equal(scale.flatten(), theirs_scale.flatten())
    theirs = ct_fake_quantize(x, theirs_scale, None, args)
    assert torch.equal(fake_quantize(x, scale, zero_point, spec), theirs)


def test_codes_of_compressed_tensors_decode_to_our_values() -> None:
    spec, args = scheme("W4A16").weight, ct("W4A16")
    assert spec is not None
    w = random(8, 256)
    scale, zero_point = mse_qparams(w, spec)
    codes = quantize(w, scale, zero_point, spec)
    theirs = ct_dequantize(codes, scale, None, args)
    assert torch.equal(theirs, fake_quantize(w, scale, zero_point, spec))


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
def test_a_gguf_scheme_starts_from_the_scales_of_the_gguf_package(name: str) -> None:
    """Equal float16 scales; codes differ where their float32 reciprocal and our division round a tie to other sides."""
    spec, kind = scheme(name).weight, GGMLQuantizationType[name]
    assert spec is not None
    w = random(16, 128)
    scale, zero_point = computed_qparams(w, spec)
    codes = quantize(w, scale, zero_point, spec)
    ours = BLOCK_TYPES[name].pack(*(x.numpy() for x in (codes, scale, zero_point, torch.empty(0)))).reshape(64, -1)
    theirs = gguf_quantize(w.numpy(), kind).reshape(64, -1)
    assert np.array_equal(ours[:, :2], theirs[:, :2])
    assert (ours != theirs).mean() < 0.02


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_torchao_decodes_and_makes_the_same_codes_given_the_scale(bits: int, symmetric: bool) -> None:
    """Compared: torchao's affine primitives in float32. They multiply by 1/scale: a power of two makes that exact."""
    spec = QuantSpec(bits, symmetric, strategy="group", group_size=32)
    w = random(16, 128)
    scale, zero_point = computed_qparams(w, spec)
    scale = torch.exp2(scale.log2().ceil())
    block, dtype = (1, 32), torch.int8 if symmetric else torch.uint8
    codes = quantize_affine(w, block, scale, zero_point.int(), dtype, int(spec.qmin), int(spec.qmax))
    assert torch.equal(codes, quantize(w, scale, zero_point, spec))
    values = dequantize_affine(codes, block, scale, zero_point.int(), dtype, int(spec.qmin), int(spec.qmax))
    assert torch.equal(values, fake_quantize(w, scale, zero_point, spec))


def test_torchao_chooses_our_scale_for_asymmetric_ranges() -> None:
    from torchao.quantization.quant_primitives import MappingType

    spec = QuantSpec(4, symmetric=False, strategy="group", group_size=32)
    w = random(16, 128)
    scale, zero_point = computed_qparams(w, spec)
    theirs_scale, theirs_zero = choose_qparams_affine(
        w, MappingType.ASYMMETRIC, (1, 32), torch.uint8, 0, 15, eps=1e-12, zero_point_dtype=torch.int32
    )
    assert torch.equal(scale, theirs_scale)
    assert torch.equal(zero_point, theirs_zero.float())


def test_ternary_weights_are_those_of_bitnet_in_float64() -> None:
    spec = QuantSpec(2, type="ternary", strategy="tensor", observer="absmean")
    w = random(64, 64)
    scale, zero_point = computed_qparams(w, spec)
    gamma = w.double().abs().mean()
    expected = (w.double() / gamma).clamp(-1, 1).round() * gamma
    torch.testing.assert_close(fake_quantize(w, scale, zero_point, spec).double(), expected, rtol=1e-6, atol=0)
    assert set(quantize(w, scale, zero_point, spec).unique().tolist()) == {-1, 0, 1}


@pytest.mark.medium
def test_an_all_zero_channel_and_an_all_zero_tensor_keep_finite_scales_in_every_format() -> None:
    for spec in SPECS:
        if spec.strategy == "token":
            continue
        for w in (torch.zeros(16, 96), torch.cat([torch.zeros(8, 96), random(8, 96)])):
            for scale, zero_point in (computed_qparams(w, spec), mse_qparams(w, spec)):
                assert scale.isfinite().all(), spec
                assert (scale != 0).all(), spec
                assert fake_quantize(w, scale, zero_point, spec).isfinite().all(), spec


def test_an_unknown_scheme_raises_an_error_with_the_nearest_name() -> None:
    assert scheme("w4a16") is SCHEMES["W4A16"]
    with pytest.raises(QatkitError, match="scheme: unknown scheme 'W4A17'; did you mean 'W4A1"):
        scheme("W4A17")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_bits": 5, "type": "float"}, "num_bits: 5 is out of range for type 'float'; use 4, 6 or 8"),
        ({"num_bits": 4, "type": "ternary"}, "num_bits: 4 is out of range for type 'ternary'; use 1 or 2"),
        ({"num_bits": 8, "type": "float", "symmetric": False}, "symmetric: false is not supported for type 'float'"),
        (
            {"num_bits": 2, "type": "ternary"},
            "observer: 'minmax' is not supported for type 'ternary'; use absmean, mse or lsq",
        ),
        ({"observer": "absmean"}, "observer: 'absmean' is not supported for type 'int'; use minmax, mse"),
        ({"observer": "lsq_plus"}, "observer: 'lsq_plus' learns a zero point, .*; set symmetric: false"),
        ({"strategy": "block"}, r"block_structure: strategy 'block' requires two sizes, not None; use \[128, 128\]"),
        ({"block_structure": [1, 2]}, "block_structure: .* has no effect with strategy 'channel'"),
        ({"scale_dtype": "float8_e8m0fnu"}, "scale_dtype: 'float8_e8m0fnu' is supported only for per-group floats"),
        ({"scale_rule": "range", "symmetric": False}, "scale_rule: 'range' is not supported for asymmetric type 'int'"),
        (
            {"num_bits": 8, "type": "float", "scale_rule": "range"},
            "scale_rule: 'range' is not supported for type 'float'",
        ),
        (
            {
                "num_bits": 4,
                "type": "nonlinear",
                "observer": "mse",
                "strategy": "group",
                "group_size": 32,
                "scale_dtype": "float8_e8m0fnu",
            },
            "scale_dtype: 'float8_e8m0fnu' is supported only for per-group floats",
        ),
        (
            {"scale_rule": "minimum", "symmetric": False},
            "scale_rule: 'minimum' is supported only for zero points and float16 scales; set symmetric: false and "
            "scale_dtype: float16",
        ),
        ({"observer": "percentile", "percentile": 30.0}, "percentile: 30.0 is out of range; use more than 50"),
    ],
)
def test_an_invalid_format_raises_an_error_with_the_fix(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        QuantSpec(**fields)
