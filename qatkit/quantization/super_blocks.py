"""Scales of super-blocks: integer scales and minima under float16 steps, as in GGUF's K-quants.

A super-block is 256 inputs of one output. Every group of 16 or 32 inputs in it has an integer scale and, with unsigned
codes, an integer minimum: ``value = code * (d * scale) - dmin * minimum``. The search first fits every group in real
numbers, and then chooses the steps and integers of the super-block. Errors may be weighted, such as by the mean square
of the inputs, like the importance matrix of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.quantization.scale_dtypes import SCALE_DTYPES
from qatkit.quantization.scales import multiples
from qatkit.quantization.slices import outer_shape, to_slices
from qatkit.spec import QuantSpec

_AT_ONCE = 2**22
"""Weights that are searched at a time."""
_ROUNDINGS = torch.linspace(-0.9, 0.9, 37, dtype=torch.float64).tolist()
"""Changes of the number of steps in a group's range that are tried."""
_STEPS = (1.0, 0.97, 0.94, 0.9, 1.03, 1.08, 1.15)
"""Factors of the smallest step that holds the largest scale of a super-block."""
_MINIMUM_STEPS = (1.0, 0.94, 1.06)
_SMALLEST, _LARGEST = 2.0**-24, 65504.0
"""The range of positive float16 numbers."""


def range_qparams(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the nearest integer scales and minima to those of every group's range; see `search_qparams`."""
    groups = to_slices(x.detach().float(), spec)
    scale, minimum = (_of_range if spec.has_minimum else _of_largest)(groups, spec)
    levels, blocks = SCALE_DTYPES[spec.scale_dtype].levels, outer_shape(scale.shape, spec)[1]
    scale = _nearest_multiples(scale, blocks, levels)[0]
    return scale, _nearest_multiples(minimum, blocks, (0, levels[1]))[0] if spec.has_minimum else minimum


def search_qparams(x: Tensor, spec: QuantSpec, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Search for the integer scales and minima with the smallest squared error.

    Args:
        x: A weight ``[out, in]``, any float dtype.
        spec: A spec with `super_blocks`.
        weights: Weight of each value's error, in the shape of `x`. The default is 1 for all values.

    Returns:
        Scales and minima ``[out, groups]``, float32; the minima of symmetric codes are zero.

    Example:
        >>> from qatkit import scheme
        >>> scale, minimum = search_qparams(torch.randn(4, 512), scheme("Q4_K").weight)
        >>> scale.shape
        torch.Size([4, 16])
    """
    x = x.detach().float()
    rows = max(_AT_ONCE // x.shape[1], 1)
    weights = None if weights is None else weights.detach().float()
    parts = [
        _search(
            to_slices(x[i : i + rows], spec), None if weights is None else to_slices(weights[i : i + rows], spec), spec
        )
        for i in range(0, len(x), rows)
    ]
    scale, minimum = (torch.cat(part) for part in zip(*parts, strict=True))
    return scale, minimum


def steps_of(scale: Tensor, minimum: Tensor, spec: QuantSpec) -> Tensor:
    """Return float16 steps of which scales and minima are multiples, ``[out, super-blocks, 1 or 2]``.

    Args:
        scale: ``[out, groups]``, from `search_qparams` or `range_qparams`.
        minimum: ``[out, groups]``.
        spec: Their spec.

    Raises:
        QatkitError: The scales or minima of a super-block have no such step.
    """
    levels = SCALE_DTYPES[spec.scale_dtype].levels
    blocks = outer_shape(scale.shape, spec)[1]
    pairs = [(scale, levels), (minimum, (0, levels[1]))][: 1 + spec.has_minimum]
    return torch.stack([_step_of(values, blocks, own) for values, own in pairs], dim=-1)


def _step_of(values: Tensor, blocks: int, levels: tuple[int, int]) -> Tensor:
    """The step of values ``[out, groups]``, ``[out, super-blocks]``: the level of the largest value is tried."""
    grouped = values.view(len(values), blocks, -1)
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    step = torch.where(largest == 0, torch.full_like(largest, _SMALLEST), 0.0)
    for level in sorted(range(levels[0], levels[1] + 1), key=abs, reverse=True):
        if level == 0 or not (missing := step == 0).any():
            break
        tried = largest / level
        factors = grouped / tried
        fits = (tried == tried.half()) & (factors == factors.round()).all(-1, keepdim=True)
        fits &= ((factors >= levels[0]) & (factors <= levels[1])).all(-1, keepdim=True)
        step = torch.where(missing & fits, tried, step)
    if (step == 0).any():
        raise QatkitError(
            "the scales of a super-block are no multiples of one float16 number", key="scale",
            advice="use the scales of mse_qparams or computed_qparams",
        )  # fmt: skip
    return step.squeeze(-1)


def _search(groups: Tensor, weights: Tensor | None, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Search for ``groups [out, groups, group_size]`` with the given weights of errors."""
    weights = torch.ones_like(groups) if weights is None else weights
    weights = weights / weights.mean().clamp(min=1e-30) + 1e-6  # inputs that are always zero count a little

    def error(scale: Tensor, minimum: Tensor) -> Tensor:
        scale, minimum = scale.unsqueeze(-1), minimum.unsqueeze(-1)
        codes = ((groups + minimum) / scale).round().clamp(spec.qmin, spec.qmax)
        return (weights * (codes * scale - minimum - groups).square()).sum(-1)

    fit = _fit_range if spec.has_minimum else _fit_largest
    return _on_grid(*fit(groups, weights, spec, error), spec, error)


Error = Callable[[Tensor, Tensor], Tensor]
"""``(scale, minimum)``: the error of every group, ``[out, groups]``."""


def _of_range(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and minimum of every group's range, which includes zero."""
    low, high = groups.aminmax(dim=-1)
    low = low.clamp(max=0)
    return ((high - low) / spec.qmax).clamp(min=1e-30), -low


def _of_largest(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The scale that maps the largest magnitude with its sign to the smallest code, as in Q4_0."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scale = largest / spec.qmin
    return torch.where(scale == 0, 1e-30, scale), torch.zeros_like(scale)


def _fit_range(groups: Tensor, weights: Tensor, spec: QuantSpec, error: Error) -> tuple[Tensor, Tensor]:
    """Weighted least squares of scale and minimum, for the codes of slightly different ranges."""
    scale, minimum = _of_range(groups, spec)
    least, low, span = error(scale, minimum), -minimum.unsqueeze(-1), (scale * spec.qmax).unsqueeze(-1)
    w, wx = weights.sum(-1), (weights * groups).sum(-1)
    for change in _ROUNDINGS:
        codes = ((groups - low) * ((spec.qmax + change) / span)).round().clamp(spec.qmin, spec.qmax)
        wc, wcc, wcx = ((weights * part).sum(-1) for part in (codes, codes * codes, codes * groups))
        determinant = w * wcc - wc * wc
        tried = (w * wcx - wx * wc) / determinant, (wc * wcx - wcc * wx) / determinant
        above = tried[1] < 0  # the values of all codes would be positive
        tried = torch.where(above, wcx / wcc, tried[0]), torch.where(above, 0.0, tried[1])
        valid = (determinant > 0) & (tried[0] > 0) & tried[0].isfinite() & tried[1].isfinite()
        tried = torch.where(valid, tried[0], scale), torch.where(valid, tried[1], minimum)
        cost = error(*tried)
        better = cost < least
        least = torch.where(better, cost, least)
        scale, minimum = torch.where(better, tried[0], scale), torch.where(better, tried[1], minimum)
    return scale, minimum


def _fit_largest(groups: Tensor, weights: Tensor, spec: QuantSpec, error: Error) -> tuple[Tensor, Tensor]:
    """Weighted least squares of the scale, for the codes of slightly different scales of both signs."""
    first, minimum = _of_largest(groups, spec)
    scale, least = first, error(first, minimum)
    for change in _ROUNDINGS[::2]:
        for sign in (1.0, -1.0):
            tried = first * (sign * spec.qmin / (spec.qmin + 0.5 + change))
            for _ in range(2):
                codes = (groups / tried.unsqueeze(-1)).round().clamp(spec.qmin, spec.qmax)
                refit = (weights * codes * groups).sum(-1) / (weights * codes * codes).sum(-1)
                tried = torch.where(refit.isfinite() & (refit != 0), refit, tried)
            cost = error(tried, minimum)
            better = cost < least
            least, scale = torch.where(better, cost, least), torch.where(better, tried, scale)
    return scale, minimum


def _on_grid(scale: Tensor, minimum: Tensor, spec: QuantSpec, error: Error) -> tuple[Tensor, Tensor]:
    """Choose the integer scales, and then the minima, with the smallest error of a super-block."""
    levels = SCALE_DTYPES[spec.scale_dtype].levels
    blocks = outer_shape(scale.shape, spec)[1]
    scale = _best_multiples(scale, blocks, levels, _STEPS, lambda tried: error(tried, minimum))
    if not spec.has_minimum:
        return scale, minimum
    kept, own = scale, (0, levels[1])
    minimum = _best_multiples(minimum, blocks, own, _MINIMUM_STEPS, lambda tried: error(kept, tried))
    return _best_multiples(scale, blocks, levels, _STEPS, lambda tried: error(tried, minimum)), minimum


def _best_multiples(
    values: Tensor, blocks: int, levels: tuple[int, int], factors: tuple[float, ...], error: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the multiples ``[out, groups]`` of the best steps of the super-blocks."""
    best = least = None
    groups = values.shape[1] // blocks
    for factor in factors:
        tried, step = _nearest_multiples(values, blocks, levels, factor)
        cost, wide = error(tried), step.repeat_interleave(groups, dim=1)
        for direction in (-1, 1):
            moved = multiples(tried + direction * wide, step, levels)
            moved_cost = error(moved)
            better = moved_cost < cost
            cost, tried = torch.where(better, moved_cost, cost), torch.where(better, moved, tried)
        total = cost.view(len(cost), blocks, -1).sum(-1).repeat_interleave(groups, dim=1)
        if best is None or least is None:
            best, least = tried, total
        best, least = torch.where(total < least, tried, best), torch.minimum(total, least)
    assert best is not None
    return best


def _nearest_multiples(
    values: Tensor, blocks: int, levels: tuple[int, int], factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Round to multiples of the step that maps the largest value of a super-block to the outermost level."""
    grouped = values.view(len(values), blocks, -1)
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
    step = largest * (factor / (levels[0] if levels[0] < 0 else levels[1]))
    size = step.abs().clamp(_SMALLEST, _LARGEST).half().float()
    step = torch.where(step < 0, -size, size)
    return multiples(values, step, levels), step
