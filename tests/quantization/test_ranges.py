"""Static activation ranges against NumPy, ONNX Runtime's calibration and a brute-force search."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime.quantization.calibrate import HistogramCollector
from torch import Tensor, nn

from qatkit import QuantSpec, calibrate, fake_quantize, prepare_qat
from qatkit.quantization.prepare import fake_quantizers
from qatkit.quantization.ranges import BINS, RangeObserver, histogram_values


def activation(observer: str, **fields: Any) -> QuantSpec:
    return QuantSpec(strategy="tensor", observer=observer, **fields)  # type: ignore[arg-type]


def calibrated(spec: QuantSpec, batches: list[Tensor]) -> tuple[float, float]:
    model = nn.Sequential(nn.Linear(batches[0].shape[-1], 2))
    prepare_qat(model, activation=spec)
    calibrate(model, batches)
    ((_, fake_quant),) = fake_quantizers(model)
    scale, zero_point = fake_quant.qparams(torch.empty(0))
    return scale.item(), zero_point.item()


def heavy_tailed(count: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(64, 128, generator=generator) for _ in range(count)]
    batches[1][0, 0], batches[2][3, 7] = 40.0, -30.0
    return batches


def test_a_histogram_has_a_bin_for_every_bfloat16_number() -> None:
    observer = RangeObserver(histogram=True)
    x = torch.tensor([0.0, -0.0, 1.0, 1.001, 1.01, -3.5, 1e-30])
    observer.update(x)
    assert observer.counts is not None
    assert observer.counts.shape == (BINS,)
    values, counts = histogram_values(observer.counts)
    # -3.5; the two zeros, by sign; 1e-30; 1 and 1.001 share a bin; 1.01 has the next
    assert counts.tolist() == [1, 1, 1, 1, 2, 1]
    assert (values.diff() >= 0).all()
    for value in x:
        nearest = (values - value).abs().min().item()
        assert nearest <= 0.004 * abs(value.item())


def test_the_moving_average_is_the_mean_of_the_batches_ranges() -> None:
    batches = heavy_tailed()
    low = np.mean([batch.min().item() for batch in batches])
    high = np.mean([batch.max().item() for batch in batches])
    scale, zero_point = calibrated(activation("moving_average", symmetric=False), batches)
    assert scale == pytest.approx((high - low) / 255, rel=1e-6)
    assert zero_point == round(-low / ((high - low) / 255))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_percentile_is_numpys_within_the_width_of_a_bin(symmetric: bool) -> None:
    batches = heavy_tailed()
    everything = torch.cat(batches).numpy()
    scale, _ = calibrated(activation("percentile", symmetric=symmetric, percentile=99.0), batches)
    if symmetric:
        expected = np.percentile(np.abs(everything), 99.0) / 127
    else:
        low, high = np.percentile(everything, [0.5, 99.5])
        expected = (high - low) / 255
    assert scale == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_mse_range_is_the_best_of_a_brute_force_over_the_values_themselves(bits: int) -> None:
    batches = heavy_tailed()
    everything = torch.cat(batches).flatten()
    spec = activation("mse", num_bits=bits)

    def error(scale: float) -> float:
        rounded = fake_quantize(everything, torch.tensor([scale]), torch.zeros(1), spec)
        return float((rounded - everything).square().mean())

    top = everything.abs().max().item() / spec.qmax
    best = min(error(top * share) for share in np.linspace(0.02, 1, 400))
    assert error(calibrated(spec, batches)[0]) <= 1.02 * best
    assert error(calibrated(spec, batches)[0]) < 0.9 * error(top)


def test_the_kl_range_is_near_that_of_onnx_runtimes_entropy_calibration() -> None:
    batches = [torch.randn(256, 128, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    batches[0][0, 0] = 12.0
    collector = HistogramCollector("entropy", True, 2048, 128, 99.99, None)
    collector.collect({"x": [batch.numpy() for batch in batches]})
    low, high = collector.compute_entropy()["x"][:2]
    scale, _ = calibrated(activation("kl"), batches)
    theirs = max(abs(float(np.asarray(low).item())), abs(float(np.asarray(high).item())))
    assert scale * 127 == pytest.approx(theirs, rel=0.25)
    assert scale * 127 < 8, "the outlier is clipped"


def test_learned_scales_start_at_the_least_squared_error_and_lsq_plus_learns_the_zero_point_too() -> None:
    torch.manual_seed(0)
    batches = [torch.rand(64, 16) * 3 - 0.5 for _ in range(2)]
    model = nn.Sequential(nn.Linear(16, 4))
    prepare_qat(model, activation=activation("lsq_plus", num_bits=3, symmetric=False))
    calibrate(model, batches)
    ((_, fake_quant),) = fake_quantizers(model)
    scale, zero_point = fake_quant.qparams(torch.empty(0))
    assert zero_point.item() == zero_point.round().item() > 0
    assert scale.item() == pytest.approx(3 / 7, rel=0.15)
    assert fake_quant.offset is not None
    assert fake_quant.scale is not None
    model(batches[0]).square().sum().backward()
    assert fake_quant.offset.grad is not None
    assert fake_quant.scale.grad is not None
    assert fake_quant(torch.zeros(1, 1)).item() == 0, "zero stays zero"


def test_the_gradients_of_lsq_plus_are_those_of_its_paper_in_float64() -> None:
    """Equations 4 and 5: inside, round(v) - v for the scale and 0 for the offset; outside, the code and 1."""
    spec = activation("lsq_plus", num_bits=3, symmetric=False)
    from qatkit import FakeQuantize

    fake_quant = FakeQuantize(spec, "activation", (1,))
    fake_quant.set_qparams(torch.tensor([0.25]), torch.tensor([2.0]))
    x = torch.tensor([[-3.0, -0.4, 0.1, 0.7, 5.0]], dtype=torch.float32)
    fake_quant(x).backward(torch.ones_like(x))
    offset, scale = -0.5, 0.25
    v = (x.double() - offset) / scale
    inside = (v >= 0) & (v <= 7)
    slope = torch.where(inside, v.round() - v, v.clamp(0, 7)).sum()
    gradient_scale = (5 * 7) ** -0.5
    assert fake_quant.scale is not None
    assert fake_quant.offset is not None
    assert fake_quant.scale.grad.item() == pytest.approx(slope.item() * gradient_scale, rel=1e-5)  # type: ignore[union-attr]
    assert fake_quant.offset.grad.item() == pytest.approx((~inside).sum().item() * gradient_scale, rel=1e-5)  # type: ignore[union-attr]
