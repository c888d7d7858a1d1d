"""The table of observers for `QuantSpec.observer`, which does not import torch.

To add an observer, write a function for each role that it supports (weights, static activations) and add a row here.
"""

from __future__ import annotations

from dataclasses import dataclass

from qatkit.common.tables import Table


@dataclass(frozen=True)
class Observer:
    """A method that chooses scales."""

    name: str
    description: str
    from_tensor: str = ""
    """``module:function`` that computes scale and zero point from a tensor. Weight scales of such an observer are
    computed in every forward pass and are never stored.
    """
    from_statistics: str = ""
    """``module:function`` that chooses the range of a static activation from calibration statistics; empty if the
    observer supports only weights.
    """
    general: bool = True
    """Whether it supports all element types that list no observers; otherwise, only types that list it."""
    weights: bool = True
    """Whether it supports weights."""
    dynamic: bool = False
    """Whether it supports activations with per-token or per-group scales."""
    histogram: bool = False
    """Whether calibration records a histogram of the values."""
    averages: bool = False
    """Whether calibration averages the ranges of the batches."""
    learned: bool = False
    """Whether the scale is a learned Parameter."""
    learned_offset: bool = False
    """Whether the zero point is learned as well."""

    @property
    def computed(self) -> bool:
        """Whether a weight's scale is computed in every forward pass."""
        return bool(self.from_tensor)


_RANGES = "qatkit.quantization.ranges"

OBSERVERS = Table(
    "observer",
    [
        Observer(
            "minmax",
            "the smallest and largest values",
            from_tensor="qatkit.quantization.estimators:minmax_qparams",
            from_statistics=f"{_RANGES}:full_range",
            dynamic=True,
        ),
        Observer(
            "absmean",
            "the mean magnitude, for ternary weights",
            from_tensor="qatkit.quantization.estimators:absmean_qparams",
            general=False,
        ),
        Observer(
            "unit",
            "the scale 1, for float16 weights",
            from_tensor="qatkit.quantization.estimators:unit_qparams",
            general=False,
        ),
        Observer(
            "mse",
            "the clipped range with the smallest squared error",
            from_statistics=f"{_RANGES}:least_squares_range",
            histogram=True,
        ),
        Observer(
            "moving_average",
            "the mean range of the calibration batches",
            from_statistics=f"{_RANGES}:mean_range",
            weights=False,
            averages=True,
        ),
        Observer(
            "percentile",
            "the range that keeps `percentile` percent of the calibration values",
            from_statistics=f"{_RANGES}:percentile_range",
            weights=False,
            histogram=True,
        ),
        Observer(
            "kl",
            "the range with the smallest KL divergence over the calibration values",
            from_statistics=f"{_RANGES}:kl_range",
            weights=False,
            histogram=True,
        ),
        Observer(
            "lsq",
            "a learned scale (LSQ), initialized to minimize the squared error",
            from_statistics=f"{_RANGES}:least_squares_range",
            histogram=True,
            learned=True,
        ),
        Observer(
            "lsq_plus",
            "a learned scale and zero point (LSQ+), initialized to minimize the squared error",
            from_statistics=f"{_RANGES}:least_squares_range",
            histogram=True,
            learned=True,
            learned_offset=True,
        ),
    ],
)
"""Every observer by name."""
