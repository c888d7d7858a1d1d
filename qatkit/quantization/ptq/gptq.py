"""GPTQ: round a weight column by column and correct the remaining columns for each error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.quantization.arithmetic import fake_quantize
from qatkit.quantization.estimators import computed_qparams, mse_qparams
from qatkit.quantization.ptq.hessian import output_error
from qatkit.spec import QuantSpec

FLOORS = (0.85, 0.7, 0.5, 0.35)
"""Lower limits for the fraction to which the search may shrink ranges. Corrections for earlier columns enlarge weights
by an amount that depends on the layer, and a narrow range then clips them. Every row uses the limit with the smallest
output error.
"""


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    damping: float = 0.01,
    block_size: int = 128,
    act_order: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight to minimize the change in the layer's outputs.

    This is algorithm 1 of Frantar et al. (2022, https://arxiv.org/abs/2210.17323), which solves equations 2 and 3 with
    a Cholesky factor of the inverse Hessian. The range search weights the squared error of each weight by its effect on
    the outputs after later columns have corrected for it. If rounding the original row to nearest has a smaller output
    error, the row is rounded to nearest instead. The weights of an input that was always zero are also rounded to
    nearest rather than set to zero, because the input may become active in training.

    Args:
        weight: ``[out, in]``.
        hessian: Mean outer product of the layer's input rows, or any multiple of it, ``[in, in]``.
        spec: Quantization of the weight; ``observer: minmax`` computes scales from ranges, and all other observers
            search.
        damping: Added to the Hessian's diagonal, as a fraction of its mean; increased tenfold if the factorization
            fails.
        block_size: Columns per block; the errors of a block are propagated to the columns after it in one matrix
            product.
        act_order: Process columns in order of decreasing Hessian diagonal. Scales are then computed from the original
            weight, so that groups stay contiguous. Otherwise, the scale of a group is computed from the corrected
            weights when the group is reached.

    Returns:
        The rounded weight ``[out, in]``, exactly on the grid of the returned scale and zero point, which have their
        stored shape. All are float32.

    Raises:
        QatkitError: The Hessian is non-finite, or not positive definite despite the damping.

    Example:
        >>> x, weight, spec = torch.randn(64, 16), torch.randn(4, 16), QuantSpec(num_bits=3)
        >>> rounded, scale, zero_point = gptq(weight, x.t() @ x, spec)
        >>> torch.equal(rounded, fake_quantize(rounded, scale, zero_point, spec))
        True
    """
    weight, hessian = weight.detach().float(), hessian.float()
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(weight.shape[1])
    order = order.to(weight.device)
    inverse = _inverse_factor(hessian[order][:, order], damping)
    costs = torch.empty_like(inverse[0])
    costs[order] = inverse.diagonal().square().reciprocal()
    floors = (1.0,) if spec.observer == "minmax" or spec.super_blocks else FLOORS
    tried = [_qparams(weight, spec, floor, costs) for floor in floors]
    grids = [torch.stack([_by_row(part, weight, spec) for part in parts]) for parts in zip(*tried, strict=True)]

    def regroup(left: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Compute the scales of one group of the corrected weights, ``[limits, out, group_size]``."""
        qparams = [_qparams(part, spec, floor, costs[columns]) for part, floor in zip(left, floors, strict=True)]
        return torch.stack([scale for scale, _ in qparams]), torch.stack([zero_point for _, zero_point in qparams])

    # with two-level scales, the outer scale and those of the groups are fixed
    grows = spec.strategy == "group" and not act_order and not spec.two_level
    rounded, *swept_grids = _sweep(weight, inverse, order, grids, spec, block_size, regroup if grows else None)
    nearest = torch.stack([fake_quantize(weight, *qparams, spec) for qparams in tried])
    errors, plain = output_error(rounded - weight, hessian), output_error(nearest - weight, hessian)  # [tried, out]
    worse = errors > plain
    for swept, before in zip((rounded, errors, *swept_grids), (nearest, plain, *grids), strict=True):
        swept[worse] = before[worse]
    if spec.strategy not in ("channel", "group"):  # several rows share one scale
        whole = int(errors.sum(1).argmin())
        return rounded[whole], *tried[whole]
    best, rows = errors.argmin(0), torch.arange(len(weight), device=weight.device)
    return rounded[best, rows], swept_grids[0][best, rows], swept_grids[1][best, rows]


def _sweep(
    weight: Tensor,
    inverse: Tensor,
    order: Tensor,
    grids: list[Tensor],
    spec: QuantSpec,
    block_size: int,
    regroup: Callable[[Tensor, slice], tuple[Tensor, Tensor]] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Process the columns once, for all tried scales together.

    Args:
        weight: ``[out, in]``.
        inverse: The result of `_inverse_factor` for the columns in `order`.
        order: Columns, ``[in]``.
        grids: Scales and zero points, each ``[tried, out, slices of a row]``.
        spec: Quantization of the weight.
        block_size: Columns per block.
        regroup: Computes the scales of a group when it is reached; None for fixed scales.

    Returns:
        Rounded weights ``[tried, out, in]``, and scales and zero points as in `grids`.
    """
    width = spec.group_size or (spec.block_structure or weight.shape)[1]
    if regroup is not None:
        block_size = max(block_size // width, 1) * width  # ensures that a group is fully corrected when it is reached
    column_spec = replace(spec, strategy="group", group_size=1, block_structure=None)
    tried = len(grids[0])
    scales, zero_points = (grid.flatten(0, 1).clone() for grid in grids)
    left, places = weight[:, order].repeat(tried, 1), order.tolist()
    rounded = torch.empty_like(left)
    for start in range(0, weight.shape[1], block_size):
        end = min(start + block_size, weight.shape[1])
        errors = torch.empty_like(left[:, start:end])
        for column in range(start, end):
            own = slice(places[column] // width, places[column] // width + 1)
            if regroup is not None and column % width == 0:
                columns = slice(column, column + width)
                qparams = regroup(left[:, columns].view(tried, len(weight), width), columns)
                scales[:, own], zero_points[:, own] = (part.flatten(0, 1) for part in qparams)
            exact = left[:, column : column + 1]
            value = fake_quantize(exact, scales[:, own], zero_points[:, own], column_spec)
            error = (exact - value) / inverse[column, column]
            left[:, column:end] -= error * inverse[column, column:end]
            rounded[:, places[column]] = value[:, 0]
            errors[:, column - start] = error[:, 0]
        left[:, end:] -= errors @ inverse[start:end, end:]
    shape = (tried, len(weight), -1)
    return rounded.view(shape), scales.view(shape), zero_points.view(shape)


def _qparams(weight: Tensor, spec: QuantSpec, floor: float, costs: Tensor) -> tuple[Tensor, Tensor]:
    """Take scale and zero point from the range, or from a search down to `floor` times it."""
    if spec.observer == "minmax":
        return computed_qparams(weight, spec)
    return mse_qparams(weight, spec, steps=30, smallest=floor, weights=costs.expand_as(weight))


def _by_row(scale: Tensor, weight: Tensor, spec: QuantSpec) -> Tensor:
    """Expand a stored scale to ``[out, slices of a row]``."""
    if spec.strategy == "tensor":
        return scale.expand(len(weight)).unsqueeze(1)
    if spec.block_structure is not None:
        return scale.repeat_interleave(spec.block_structure[0], dim=0)[: len(weight)]
    return scale


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Compute the upper triangular U for which ``U^T U`` is the inverse of the damped Hessian.

    ``H = R R^T`` with an upper triangular R is the Cholesky factorization from the last column to the first, and U is
    the inverse of R. This avoids inverting the Hessian itself, which would square the rounding errors.
    """
    if not hessian.isfinite().all():
        raise QatkitError(
            "gptq: the Hessian has non-finite values", advice="check the layer's inputs for NaN and infinity"
        )
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else diagonal.new_ones(())
    diagonal[dead] = mean
    for added in (damping, 9 * damping, 90 * damping):  # tries 1, 10 and 100 times the damping
        diagonal += added * mean
        lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if int(info) == 0:
            eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            upper: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            return upper
    raise QatkitError(
        f"gptq: the Hessian is not positive definite with damping {damping}", key="damping",
        advice="use a larger damping, such as 0.1",
    )  # fmt: skip
