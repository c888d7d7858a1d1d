"""What initialisers need to know of a layer's inputs, summed up so that no input is kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.quantization.layers import QATLayer, QATTransposedLinear

_SAMPLES = 8  # of a convolution's batch that are unfolded at a time


class InputStatistics:
    """Sums over the rows that a layer multiplied with its weight matrix.

    Attributes:
        rows: How many there were.
        absmax: Largest magnitude of every input, float32 ``[in]``; None before the first row.

    Args:
        second_moment: Also keep what `hessian` needs, ``[in, in]``.
    """

    def __init__(self, second_moment: bool) -> None:
        self.rows = 0
        self.absmax: Tensor | None = None
        self._abssum: Tensor | None = None
        self._moment: Tensor | None = None
        self._second_moment = second_moment

    def update(self, rows: Tensor) -> None:
        """Take in rows ``[n, in]``; no rows (an expert that got no token) say nothing."""
        if not len(rows):
            return
        rows = rows.detach().float()
        if self.absmax is None or self._abssum is None:
            self.absmax, self._abssum = rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1])
            self._moment = rows.new_zeros(rows.shape[1], rows.shape[1]) if self._second_moment else None
        self.rows += len(rows)
        self.absmax = torch.maximum(self.absmax, rows.abs().amax(0))
        self._abssum += rows.abs().sum(0)
        if self._moment is not None:
            self._moment.addmm_(rows.t(), rows)

    @property
    def magnitude(self) -> Tensor:
        """Mean magnitude of every input, float32 ``[in]``."""
        assert self._abssum is not None
        return self._abssum / self.rows

    @property
    def hessian(self) -> Tensor:
        """Mean of the rows' outer products, float32 ``[in, in]``: half the Hessian of the output's squared error."""
        assert self._moment is not None
        return self._moment / self.rows

    @property
    def finite(self) -> bool:
        """Whether every number that was taken in is finite."""
        return self.absmax is None or bool(self.absmax.isfinite().all())

    def rescale(self, scales: Tensor) -> None:
        """As if every row had been divided by `scales`, ``[in]``."""
        assert self.absmax is not None
        assert self._abssum is not None
        self.absmax, self._abssum = self.absmax / scales, self._abssum / scales
        if self._moment is not None:
            self._moment /= scales[:, None] * scales


def fits(layer: QATLayer) -> bool:
    """Whether a layer multiplies rows of inputs with one weight matrix: linear layers and ungrouped convolutions."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.groups == 1
    return isinstance(layer, nn.Linear | QATTransposedLinear)


def watch(layer: QATLayer, x: Tensor, statistics: InputStatistics) -> None:
    """Take in what `layer` multiplies with its weight ``[out, in, ...]`` flattened to ``[out, in * ...]``.

    Args:
        layer: A layer that `fits`.
        x: Its input.
        statistics: Where the rows go.
    """
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        statistics.update(x.reshape(-1, x.shape[-1]))
        return
    flat = isinstance(layer, nn.Conv1d)
    padding, mode = layer._reversed_padding_repeated_twice, layer.padding_mode
    for part in torch.split(x, _SAMPLES):
        part = F.pad(part, padding, mode="constant" if mode == "zeros" else mode)
        kernel, dilation, stride = (
            (1, *size) if flat else size for size in (layer.kernel_size, layer.dilation, layer.stride)
        )
        patches = F.unfold(part.unsqueeze(-2) if flat else part, kernel, dilation, 0, stride)  # [n, in * ..., places]
        statistics.update(patches.transpose(1, 2).flatten(0, 1))


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """Mean squared error of every output that an error of the weight causes, ``diag(E H E^T)``.

    Args:
        error: Rounded minus exact weight, ``[..., out, in]``.
        hessian: ``[..., in, in]``.

    Returns:
        ``[..., out]``.
    """
    return ((error @ hessian) * error).sum(-1)
