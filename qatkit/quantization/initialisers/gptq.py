"""GPTQ: round a weight column by column, and let the columns that are still to come make up for each error."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.quantization.arithmetic import fake_quantize
from qatkit.quantization.initialisers.hessian import output_error
from qatkit.quantization.observers import minmax_qparams, mse_qparams
from qatkit.spec import QuantSpec


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    damping: float = 0.01,
    block_size: int = 128,
    act_order: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight so that the layer's output changes least.

    Frantar et al., 2022, https://arxiv.org/abs/2210.17323, algorithm 1: equations 2 and 3 through a Cholesky factor of
    the inverse Hessian. A row that comes out worse than rounded to nearest is rounded to nearest. An input that was
    always zero is rounded to nearest too, not to zero: in training it may wake up.

    Args:
        weight: ``[out, in]``.
        hessian: Mean outer product of the layer's input rows, or any multiple, ``[in, in]``.
        spec: How the weight is quantized; ``observer: minmax`` takes scales from ranges, every other one searches the
            least squared error.
        damping: Added to the Hessian's diagonal, as a share of its mean; grows tenfold where the factorization fails.
        block_size: Columns whose errors reach the columns behind them in one product.
        act_order: Go through the columns by falling Hessian diagonal. Scales then come from the weight as it was, so
            that groups stay contiguous. Without, a group's scale comes from the weights as they are when it is reached.

    Returns:
        The rounded weight ``[out, in]``, exactly on the grid of the returned scale and zero point (stored shapes), all
        float32.

    Raises:
        QatkitError: the Hessian is not finite, or not positive definite in spite of the damping.

    Example:
        >>> x, weight, spec = torch.randn(64, 16), torch.randn(4, 16), QuantSpec(num_bits=3)
        >>> rounded, scale, zero_point = gptq(weight, x.t() @ x, spec)
        >>> torch.equal(rounded, fake_quantize(rounded, scale, zero_point, spec))
        True
    """
    weight, hessian = weight.detach().float(), hessian.float()
    scale, zero_point = slice_qparams(weight, spec)
    nearest = fake_quantize(weight, scale, zero_point, spec)
    scales, zero_points = _by_row(scale, weight, spec).clone(), _by_row(zero_point, weight, spec).clone()
    width = _slice_width(weight, spec)
    # groups whose scale is still to come; a scale over the scales fixes them all
    grows = spec.strategy == "group" and not act_order and not spec.two_level
    if grows:
        block_size = max(block_size // width, 1) * width  # so that every group is up to date when it is reached
    column_spec = replace(spec, strategy="group", group_size=1, block_structure=None)

    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(weight.shape[1])
    order = order.to(weight.device)
    inverse = _inverse_factor(hessian[order][:, order], damping)
    left, rounded, places = weight[:, order], torch.empty_like(weight), order.tolist()
    for start in range(0, weight.shape[1], block_size):
        end = min(start + block_size, weight.shape[1])
        errors = torch.empty_like(left[:, start:end])
        for column in range(start, end):
            own = slice(places[column] // width, places[column] // width + 1)
            if grows and column % width == 0:
                scales[:, own], zero_points[:, own] = slice_qparams(left[:, column : column + width], spec)
            exact = left[:, column : column + 1]
            value = fake_quantize(exact, scales[:, own], zero_points[:, own], column_spec)
            error = (exact - value) / inverse[column, column]
            left[:, column:end] -= error * inverse[column, column:end]
            rounded[:, places[column]] = value[:, 0]
            errors[:, column - start] = error[:, 0]
        left[:, end:] -= errors @ inverse[start:end, end:]

    worse = output_error(rounded - weight, hessian) > output_error(nearest - weight, hessian)
    rounded[worse] = nearest[worse]
    if grows:
        scales[worse], zero_points[worse] = scale[worse], zero_point[worse]
        return rounded, scales, zero_points
    return rounded, scale, zero_point


def slice_qparams(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight as ``spec.observer`` says: from the range, else of least squared error."""
    return minmax_qparams(weight, spec) if spec.observer == "minmax" else mse_qparams(weight, spec)


def _by_row(scale: Tensor, weight: Tensor, spec: QuantSpec) -> Tensor:
    """A stored scale as ``[out, slices of a row]``."""
    if spec.strategy == "tensor":
        return scale.expand(len(weight)).unsqueeze(1)
    if spec.block_structure is not None:
        return scale.repeat_interleave(spec.block_structure[0], dim=0)[: len(weight)]
    return scale


def _slice_width(weight: Tensor, spec: QuantSpec) -> int:
    """How many neighbours in a row share a scale."""
    if spec.block_structure is not None:
        return spec.block_structure[1]
    return spec.group_size or weight.shape[1]


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U with ``U^T U`` the inverse of the damped Hessian.

    ``H = R R^T`` with R upper triangular is the Cholesky factorization from the last column to the first; then U is the
    inverse of R. So the Hessian is never inverted itself, which would square the rounding errors.
    """
    if not hessian.isfinite().all():
        raise QatkitError("gptq: the Hessian holds NaN or infinite values; the layer's inputs are not finite")
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else diagonal.new_ones(())
    diagonal[dead] = mean
    for share in (damping, 9 * damping, 90 * damping):  # 1, 10 and 100 times the damping in all
        diagonal += share * mean
        lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if int(info) == 0:
            eye = torch.eye(len(hessian), device=hessian.device)
            upper: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            return upper
    raise QatkitError(
        f"gptq: the Hessian is not positive definite with damping {damping}; write a larger one, such as 0.1"
    )
