"""Statistics of static activations, and the ranges that observers choose from them.

A histogram has one bin per bfloat16 number (the top 16 bits of a float32). It therefore needs no range in advance, and
the histograms of multiple processes can be summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qatkit.common.tables import implementation
from qatkit.quantization.arithmetic import fake_quantize
from qatkit.quantization.estimators import QParams, mse_qparams
from qatkit.quantization.observers import OBSERVERS
from qatkit.quantization.scales import choose_qparams
from qatkit.spec import QuantSpec

BINS = 1 << 16
_KL_BINS = 2048


class RangeObserver:
    """Records the smallest and largest activation, over all calls and averaged over calls.

    Args:
        histogram: Whether to also count the values per bin.

    Attributes:
        low: Smallest value, float32 ``[1]``; None before the first call.
        high: Largest value, float32 ``[1]``.
        sums: Sum of the per-call minima, sum of the per-call maxima, and number of calls; float64 ``[3]``.
        counts: Values per bin, int64 ``[BINS]``; None without a histogram.
    """

    def __init__(self, histogram: bool = False) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.counts: Tensor | None = torch.zeros(BINS, dtype=torch.int64) if histogram else None

    def update(self, x: Tensor) -> None:
        """Record `x`; an empty tensor (from an expert that received no tokens) is skipped."""
        if x.numel() == 0:
            return
        x = x.detach().float()
        low, high = (end.view(1) for end in torch.aminmax(x))
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.sums += torch.cat([low, high, torch.ones_like(low)]).double().cpu()
        if self.counts is not None:
            bits = x.contiguous().view(torch.int32).flatten() >> 16  # -32768 to 32767: the sign is the highest bit
            self.counts += torch.bincount(bits + BINS // 2, minlength=BINS).cpu()


def histogram_values(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the midpoint of every non-empty bin, float32 ascending, and its count, float64."""
    used = counts.nonzero().flatten()
    bits = (used - BINS // 2).to(torch.int32) << 16
    lower = bits.view(torch.float32)
    upper = (bits | 0xFFFF).view(torch.float32)
    middle = torch.where(
        bits << 1 == 0, 0.0, (lower.double() + upper.double()).div(2).float()
    )  # the middle of the bin of zero is zero
    order = middle.argsort()
    return middle[order], counts[used][order].double()


@dataclass(frozen=True)
class Statistics:
    """The statistics of one static activation, over all batches and processes.

    Attributes:
        low: Smallest value, float32 ``[1]``.
        high: Largest value, float32 ``[1]``.
        mean: Mean of the per-call minima and of the per-call maxima, float32 ``[2]``.
        counts: Histogram of the values; None unless the observer needs one.
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    counts: Tensor | None = None

    @property
    def values(self) -> tuple[Tensor, Tensor]:
        """Return the values of the histogram and their counts; see `histogram_values`."""
        assert self.counts is not None
        return histogram_values(self.counts)


def static_qparams(statistics: Statistics, spec: QuantSpec) -> QParams:
    """Choose the scale and zero point of a static activation with the spec's observer.

    Args:
        statistics: Statistics from calibration.
        spec: The quantization, with strategy "tensor".

    Returns:
        Scale and zero point, float32 ``[1]``.
    """
    qparams: QParams = implementation(OBSERVERS[spec.observer].from_statistics)(statistics, spec)
    return qparams


def full_range(statistics: Statistics, spec: QuantSpec) -> QParams:
    """Use the full range of the values (``observer: minmax``)."""
    return choose_qparams(statistics.low, statistics.high, spec)


def mean_range(statistics: Statistics, spec: QuantSpec) -> QParams:
    """Use the mean range of the calls (``observer: moving_average``)."""
    return choose_qparams(statistics.mean[:1], statistics.mean[1:], spec)


def least_squares_range(statistics: Statistics, spec: QuantSpec) -> QParams:
    """Search for the range with the smallest squared error (``observer: mse``, and the initial range of LSQ)."""
    values, weights = statistics.values
    # the narrowest range is 1% of the full one: an outlier may be 100 times as large as all other values
    return mse_qparams(values, spec, steps=200, smallest=0.01, weights=weights)


def kl_range(statistics: Statistics, spec: QuantSpec) -> QParams:
    """Search for the range with the smallest KL divergence (``observer: kl``)."""
    fraction = _kl_fraction(*statistics.values, spec)
    return choose_qparams(statistics.low * fraction, statistics.high * fraction, spec)


def percentile_range(statistics: Statistics, spec: QuantSpec) -> QParams:
    """Keep ``spec.percentile`` percent of the values (``observer: percentile``)."""
    return choose_qparams(*_percentile(*statistics.values, spec), spec)


def _percentile(values: Tensor, weights: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Find the range that keeps the percentile of the values.

    Symmetric codes keep the smallest magnitudes; otherwise both ends lose the same fraction.
    """
    keep = spec.percentile / 100
    if spec.symmetric:
        values, order = values.abs().sort()
        weights = weights[order]
    total = weights.cumsum(0) / weights.sum()
    top = values[torch.searchsorted(total, keep if spec.symmetric else (1 + keep) / 2).clamp(max=len(values) - 1)].view(
        1
    )
    if spec.symmetric:
        return -top, top
    return values[torch.searchsorted(total, (1 - keep) / 2).clamp(max=len(values) - 1)].view(1), top


def _kl_fraction(values: Tensor, weights: Tensor, spec: QuantSpec) -> float:
    """Find the fraction of the range whose quantized distribution is closest to the data.

    Migacz, "8-bit inference with TensorRT", GTC 2017, slide 38, on 2048 equal bins over the full range. Both ends are
    scaled by the same fraction, so asymmetric codes are supported as well.
    """
    low, high = values.amin(), values.amax()
    if spec.symmetric:
        values = values.abs()
        low = torch.zeros_like(high)
        high = values.amax()
    if high <= low:
        return 1.0
    step = (high - low) / _KL_BINS
    bins = torch.zeros(_KL_BINS, dtype=torch.float64)
    bins.index_add_(0, ((values - low) / step).long().clamp(max=_KL_BINS - 1), weights)
    middles = low + (torch.arange(_KL_BINS, dtype=torch.float32) + 0.5) * step
    best, best_fraction = float("inf"), 1.0
    for fraction in torch.linspace(1.0, 0.05, 191, dtype=torch.float32).tolist():
        # fake quantization maps every bin to the value of its code, which identifies the code
        scale, zero_point = choose_qparams(
            (low if not spec.symmetric else -high).view(1) * fraction, high.view(1) * fraction, spec
        )
        kept = (middles >= low * fraction) & (middles <= high * fraction)
        if not kept.any():
            continue
        reference = bins * kept
        inside = kept.nonzero().flatten()
        reference[inside[0]] += bins[: inside[0]].sum()
        reference[inside[-1]] += bins[inside[-1] + 1 :].sum()
        rounded = fake_quantize(middles[kept], scale, zero_point, spec)
        code = torch.unique(rounded, return_inverse=True)[1]
        mass = torch.zeros(int(code.max()) + 1, dtype=torch.float64).index_add_(0, code, bins[kept])
        filled = (bins[kept] > 0).double()
        places = torch.zeros_like(mass).index_add_(0, code, filled).clamp(min=1)
        candidate = (mass / places)[code] * filled
        p, q = reference[kept] / reference.sum(), candidate / candidate.sum().clamp(min=1e-300)
        # clipping adds mass where the candidate has none; there the candidate gets a tiny probability
        divergence = float((p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-9).log())).sum())
        if divergence < best:
            best, best_fraction = divergence, fraction
    return best_fraction
