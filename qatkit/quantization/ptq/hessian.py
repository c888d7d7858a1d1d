"""Statistics of a layer's inputs for PTQ methods, accumulated without keeping the inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.quantization.layers import QATLayer, QATTransposedLinear

_SAMPLES = 8  # samples of a convolution's batch that are unfolded at a time
_ROWS = 256  # minimum number of rows in a sample, if there are that many


class InputStatistics:
    """Statistics of the input rows that a layer multiplies by its weight matrix.

    Args:
        second_moment: Whether to accumulate the second moment for `hessian`, ``[in, in]``; otherwise, rows are kept for
            `sample`.

    Attributes:
        rows: Number of rows.
    """

    def __init__(self, second_moment: bool) -> None:
        self.rows = 0
        self._kept: list[Tensor] = []
        self._stride = 1
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._abssum: Tensor | None = None
        self._moment: Tensor | None = None
        self._second_moment = second_moment

    def update(self, rows: Tensor) -> None:
        """Add rows ``[n, in]``; an empty tensor (from an expert that received no tokens) is skipped."""
        if not len(rows):
            return
        rows = rows.detach().float()
        if self._low is None or self._high is None or self._abssum is None:
            self._low, self._high, self._abssum = (rows.new_zeros(rows.shape[1]) for _ in range(3))
            self._moment = rows.new_zeros(rows.shape[1], rows.shape[1]) if self._second_moment else None
        if self._moment is None:
            self._keep(rows)
        self.rows += len(rows)
        low, high = rows.aminmax(dim=0)
        self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        self._abssum += rows.abs().sum(0)
        if self._moment is not None:
            self._moment.addmm_(rows.t(), rows)

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude of every input, float32 ``[in]``."""
        assert self._low is not None
        assert self._high is not None
        return torch.maximum(-self._low, self._high)

    @property
    def half_range(self) -> Tensor:
        """Half of the range of every input, zero included, float32 ``[in]``."""
        assert self._low is not None
        assert self._high is not None
        return (self._high - self._low) / 2

    @property
    def magnitude(self) -> Tensor:
        """Mean magnitude of every input, float32 ``[in]``."""
        assert self._abssum is not None
        return self._abssum / self.rows

    @property
    def hessian(self) -> Tensor:
        """Mean outer product of the rows, float32 ``[in, in]``.

        It is half the Hessian of the squared output error.
        """
        assert self._moment is not None
        return self._moment / self.rows

    def _keep(self, rows: Tensor) -> None:
        """Keep every `_stride`-th row; drop every second one when there are too many."""
        self._kept.append(rows[-self.rows % self._stride :: self._stride].clone())
        while sum(map(len, self._kept)) >= 2 * _ROWS:
            self._kept, self._stride = [torch.cat(self._kept)[::2]], 2 * self._stride

    @property
    def sample(self) -> Tensor:
        """Evenly spaced rows, float32 ``[n, in]``: 256 to 512 rows, or all if there are fewer."""
        return torch.cat(self._kept)

    @property
    def finite(self) -> bool:
        """Whether all values have been finite."""
        return self.rows == 0 or bool(self.half_range.isfinite().all())

    def rescale(self, scales: Tensor) -> None:
        """Update the statistics as if every row had been divided by `scales`, ``[in]``."""
        assert self._low is not None
        assert self._high is not None
        assert self._abssum is not None
        self._low, self._high, self._abssum = self._low / scales, self._high / scales, self._abssum / scales
        if self._moment is not None:
            self._moment /= scales[:, None] * scales
        self._kept = [rows / scales for rows in self._kept]


def is_matrix_product(layer: QATLayer) -> bool:
    """Whether a layer multiplies rows by a single matrix, as linear layers and ungrouped convolutions do."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.groups == 1
    return isinstance(layer, nn.Linear | QATTransposedLinear)


def record_inputs(layer: QATLayer, x: Tensor, statistics: InputStatistics) -> None:
    """Add the rows that a layer multiplies by its flattened weight ``[out, in * ...]``.

    Args:
        layer: A layer for which `is_matrix_product` is true.
        x: Its input.
        statistics: Statistics to update.
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
    """Compute the mean squared error of every output, ``diag(E H E^T)``.

    Args:
        error: Quantized minus exact weight, ``[..., out, in]``.
        hessian: ``[..., in, in]``.

    Returns:
        ``[..., out]``.
    """
    return ((error @ hessian) * error).sum(-1)
