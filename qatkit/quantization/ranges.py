"""What calibration remembers of static activations, and how that becomes a range.

A histogram has one bin per bfloat16 number (the top 16 bits of a float32), so that no range has to be known before and
the histograms of several processes simply add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit.quantization.arithmetic import choose_qparams, fake_quantize
from qatkit.quantization.observers import mse_qparams
from qatkit.spec import QuantSpec

BINS = 1 << 16
_KL_BINS = 2048


class RangeObserver:
    """The smallest and largest activation that passed, over everything and on average over the calls.

    Attributes:
        low: Smallest value, float32 ``[1]``; None before the first.
        high: Largest value, float32 ``[1]``.
        sums: Sum over the calls of their smallest and of their largest value, and the number of calls; float64 ``[3]``.
        counts: Values per bin, int64 ``[BINS]``; None unless `histogram`.
    """

    def __init__(self, histogram: bool = False) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.counts: Tensor | None = torch.zeros(BINS, dtype=torch.int64) if histogram else None

    def update(self, x: Tensor) -> None:
        """Take in `x`; an empty tensor (an expert that got no token) says nothing."""
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


def needs_histogram(spec: QuantSpec) -> bool:
    """Whether a static range is chosen from the distribution of the values."""
    return spec.observer in ("percentile", "kl", "mse", "lsq", "lsq_plus")


def histogram_values(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The middle of every bin that is not empty, float32 ascending, and its count, float64."""
    used = counts.nonzero().flatten()
    bits = (used - BINS // 2).to(torch.int32) << 16
    lower = bits.view(torch.float32)
    upper = (bits | 0xFFFF).view(torch.float32)
    middle = torch.where(
        bits << 1 == 0, 0.0, (lower.double() + upper.double()).div(2).float()
    )  # the bin of zero is zero
    order = middle.argsort()
    return middle[order], counts[used][order].double()


def static_qparams(
    low: Tensor, high: Tensor, mean: Tensor, counts: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a static activation from what calibration saw.

    Args:
        low: Smallest value, float32 ``[1]``.
        high: Largest value, ``[1]``.
        mean: Mean over the calls of their smallest and largest value, float32 ``[2]``.
        counts: Histogram of the values, where the observer needs one.
        spec: The quantization, strategy "tensor".

    Returns:
        Scale and zero point, float32 ``[1]``.
    """
    if spec.observer == "moving_average":
        return choose_qparams(mean[:1], mean[1:], spec)
    if counts is None:
        return choose_qparams(low, high, spec)
    values, weights = histogram_values(counts)
    if spec.observer == "percentile":
        low, high = _percentile(values, weights, spec)
    elif spec.observer == "kl":
        share = _kl_share(values, weights, spec)
        low, high = low * share, high * share
    else:  # mse; and where learning starts
        return mse_qparams(
            values, spec, steps=200, smallest=0.01, weights=weights
        )  # one outlier may be 100 times the rest
    return choose_qparams(low, high, spec)


def _percentile(values: Tensor, weights: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The range of that percentage of the values: of magnitudes if symmetric, else cut alike at both ends."""
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


def _kl_share(values: Tensor, weights: Tensor, spec: QuantSpec) -> float:
    """The share of the range whose clipped and quantized distribution is nearest to the real one.

    Migacz, "8-bit inference with TensorRT", GTC 2017, slide 38, on 2048 equal bins over the whole range; both ends are
    moved alike, so it also serves asymmetric codes.
    """
    low, high = values.amin(), values.amax()
    if spec.symmetric:
        values = values.abs()
        low = torch.zeros(())
        high = values.amax()
    if high <= low:
        return 1.0
    step = (high - low) / _KL_BINS
    bins = torch.zeros(_KL_BINS, dtype=torch.float64)
    bins.index_add_(0, ((values - low) / step).long().clamp(max=_KL_BINS - 1), weights)
    middles = low + (torch.arange(_KL_BINS) + 0.5) * step
    best, best_share = float("inf"), 1.0
    for share in torch.linspace(1.0, 0.05, 191).tolist():
        # codes of the clipped values: fake quantization maps every bin to its code's value
        scale, zero_point = choose_qparams(
            (low if not spec.symmetric else -high).view(1) * share, high.view(1) * share, spec
        )
        kept = (middles >= low * share) & (middles <= high * share)
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
        # what clipping put where the candidate has nothing costs as much as a tiny probability does
        divergence = float((p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-9).log())).sum())
        if divergence < best:
            best, best_share = divergence, share
    return best_share
