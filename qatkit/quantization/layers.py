"""Quantized layers: subclasses of torch's layers, swapped in by changing a layer's class in place.

A swap changes the layer's class and adds the fake quantizers; the module object, its Parameters and its hooks stay the
same. Optimizers, weight ties, `state_dict` keys and FSDP therefore keep working.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qatkit.quantization.arithmetic import in_dtype
from qatkit.quantization.block_sums import rounds_sums, with_rounded_sums
from qatkit.quantization.linear import quantized_linear
from qatkit.quantization.modules import FakeQuantize


class QATLayer(nn.Module):
    """Base class of quantized layers, with fake quantizers for weight and input; either may be None."""

    weight: Tensor
    bias: Tensor | None
    weight_fake_quant: FakeQuantize | None
    input_fake_quant: FakeQuantize | None
    transposed = False
    """Whether the weight is ``[in, out, ...]``; scales always refer to ``[out, in, ...]``."""
    input_on_grid = False
    """Whether the input is already quantized where it is computed, by ``input_fake_quant``, so that only its scale is
    read here.
    """

    @property
    def matrix(self) -> Tensor:
        """Return the latent (unquantized) weight as ``[out, in, ...]``."""
        return self.weight

    def as_stored(self, matrix: Tensor) -> Tensor:
        """Return ``[out, in, ...]`` values in the layout of the weight; the inverse of `matrix`."""
        return matrix

    @torch.no_grad()
    def set_matrix(self, values: Tensor) -> None:
        """Overwrite the latent weight with `values`, ``[out, in, ...]``."""
        self.weight.copy_(self.as_stored(values))

    def fake_quantized_weight(self) -> Tensor:
        """Return the weight used in the forward pass, in its own dtype and layout."""
        return self._weight_and_scale()[0]

    def _weight_and_scale(self) -> tuple[Tensor, Tensor | None]:
        if self.weight_fake_quant is None:
            weight, scale = self.matrix, None
        else:
            weight, scale = self.weight_fake_quant.with_scale(self.matrix)
        return self.as_stored(weight), scale

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the input, weight and bias used in the forward pass.

        Integer kernels add the bias to sums of products of codes, as an integer multiple of weight scale times input
        scale. Training rounds the bias in the same way, because this step is large enough to change the output with
        4-bit weights. Without a static input scale, or with multiple scales per output, runtimes add the bias in
        floating point.
        """
        weight, weight_scale = self._weight_and_scale()
        x, input_scale = self._quantized_input(x)
        bias = self._rounded_bias(weight_scale, input_scale)
        weights, inputs = self.weight_fake_quant, self.input_fake_quant
        if weights is not None and inputs is not None and input_scale is not None and rounds_sums(weights, inputs):
            x, matrix = with_rounded_sums(x, input_scale, weights, self.matrix, self.as_stored(weight))
            weight = self.as_stored(matrix)
        return x, weight, bias

    def _quantized_input(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        inputs = self.input_fake_quant
        if inputs is None:
            return x, None
        if self.input_on_grid:
            return x, None if inputs.observer is not None or not inputs.ready else inputs.qparams(x)[0]
        return inputs.with_scale(x)

    def _product(self, x: Tensor) -> Tensor:
        """Compute the output ``[..., out]`` of a linear layer, and keep little for the backward pass."""
        weights, inputs, codes = self.weight_fake_quant, self.input_fake_quant, None
        appends = weights is not None and inputs is not None and rounds_sums(weights, inputs)
        if appends or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.linear(*self.operands(x))  # a compiler decides itself what it keeps
        weight = self.matrix
        grid = None if weights is None else weights.grid(weight)
        if inputs is None or self.input_on_grid:
            x, scale = self._quantized_input(x)
        else:
            x, scale, codes = inputs.quantized(x, codes=True)
        return quantized_linear(x, codes, weight, grid, self._rounded_bias(grid.scale if grid else None, scale))

    def shipped(self) -> dict[str, Tensor]:
        """Return the weight and bias used in the forward pass, by parameter name, for a plain layer."""
        weight, weight_scale = self._weight_and_scale()
        inputs = self.input_fake_quant
        input_scale = None if inputs is None or inputs.dynamic or not inputs.ready else inputs.qparams(weight)[0]
        bias = self._rounded_bias(weight_scale, input_scale)
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

    def _rounded_bias(self, weight_scale: Tensor | None, input_scale: Tensor | None) -> Tensor | None:
        return rounded_bias(self.bias, self.weight_fake_quant, self.input_fake_quant, weight_scale, input_scale)


def rounded_bias(
    bias: Tensor | None,
    weights: FakeQuantize | None,
    inputs: FakeQuantize | None,
    weight_scale: Tensor | None,
    input_scale: Tensor | None,
) -> Tensor | None:
    """Round a bias ``[out]`` to multiples of weight scale times input scale, if integer kernels use such a bias."""
    if bias is None or weight_scale is None or input_scale is None:
        return bias
    if weight_scale.shape not in ((1,), (len(bias), 1)):  # several scales per output: added in floating point
        return bias
    if weights is None or inputs is None or inputs.dynamic or weights.spec.is_float or inputs.spec.is_float:
        return bias
    step = (weight_scale * input_scale).view(-1)
    return _RoundToMultiple.apply(bias, step)  # type: ignore[no-untyped-call, no-any-return]


class _RoundToMultiple(torch.autograd.Function):
    """Round to the nearest multiple of a step, with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor) -> Tensor:
        steps = x.float() / step
        # from 2**23 on every float is an integer; below a step of 1e-38 the quotient is infinite, and the value is kept
        return in_dtype(torch.where(steps.abs() < 2**23, steps.round() * step, x.float()), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class QATLinear(QATLayer, nn.Linear):
    """`nn.Linear` with a fake-quantized weight and input."""

    bias: Tensor | None  # type: ignore[assignment]  # torch says it is always there

    def forward(self, input: Tensor) -> Tensor:
        return self._product(input)


class QATOutputProjection(QATLayer, NonDynamicallyQuantizableLinear):
    """The ``out_proj`` of `nn.MultiheadAttention` with a fake-quantized weight and input."""

    bias: Tensor | None  # type: ignore[assignment]  # torch says it is always there

    def forward(self, input: Tensor) -> Tensor:
        return self._product(input)


class QATConv1d(QATLayer, nn.Conv1d):
    """`nn.Conv1d` with a fake-quantized weight and input."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self._conv_forward(*self.operands(input)))


class QATConv2d(QATLayer, nn.Conv2d):
    """`nn.Conv2d` with a fake-quantized weight and input."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self._conv_forward(*self.operands(input)))


class QATConv3d(QATLayer, nn.Conv3d):
    """`nn.Conv3d` with a fake-quantized weight and input."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self._conv_forward(*self.operands(input)))


class _QATConvTranspose(QATLayer, nn.modules.conv._ConvTransposeNd):
    """Transposed convolutions, whose weight is ``[in, out / groups, ...]``."""

    bias: Tensor | None
    transposed = True

    @property
    def matrix(self) -> Tensor:
        return swapped(self.weight, self.groups)

    def as_stored(self, matrix: Tensor) -> Tensor:
        return swapped(matrix, self.groups)

    def _arguments(self, x: Tensor, output_size: list[int] | None) -> tuple[Any, ...]:
        sizes: Any = (self.stride, self.padding, self.kernel_size, self.weight.dim() - 2, self.dilation)
        added = self._output_padding(x, output_size, *sizes)
        return (*self.operands(x), self.stride, self.padding, added, self.groups, self.dilation)


def swapped(weight: Tensor, groups: int) -> Tensor:
    """Turn ``[in, out / groups, ...]`` into ``[out, in / groups, ...]``, or back; a view if `groups` is 1."""
    if groups == 1:
        return weight.transpose(0, 1)
    return weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)


class QATConvTranspose1d(_QATConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with a fake-quantized weight and input."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return F.conv_transpose1d(*self._arguments(input, output_size))


class QATConvTranspose2d(_QATConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with a fake-quantized weight and input."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return F.conv_transpose2d(*self._arguments(input, output_size))


class QATEmbedding(QATLayer, nn.Embedding):
    """`nn.Embedding` with a fake-quantized weight; each row is a channel."""

    bias = None

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            input, self.fake_quantized_weight(), self.padding_idx, self.max_norm, self.norm_type,
            self.scale_grad_by_freq, self.sparse,
        )  # fmt: skip


class QATEmbeddingBag(QATLayer, nn.EmbeddingBag):
    """`nn.EmbeddingBag` with a fake-quantized weight; each row is a channel."""

    bias = None

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return F.embedding_bag(
            input, self.fake_quantized_weight(), offsets, self.max_norm, self.norm_type, self.scale_grad_by_freq,
            self.mode, self.sparse, per_sample_weights, self.include_last_offset, self.padding_idx,
        )  # fmt: skip


class QATTransposedLinear(QATLayer):
    """transformers' `Conv1D` (a linear layer with an ``[in, out]`` weight) with a fake-quantized weight and input."""

    nf: int
    transposed = True

    @property
    def matrix(self) -> Tensor:
        return self.weight.t()

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def __reduce__(self) -> tuple[Any, ...]:
        kind = next(kind for kind in type(self).__mro__ if kind.__name__ == "Conv1D")
        return _new_transposed, (kind,), self.__dict__  # the class itself has no importable name

    def forward(self, x: Tensor) -> Tensor:
        x, weight, bias = self.operands(x)
        assert bias is not None
        return torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], self.nf)


SWAPS: dict[type[nn.Module], type[QATLayer]] = {
    nn.Linear: QATLinear,
    nn.Conv1d: QATConv1d,
    nn.Conv2d: QATConv2d,
    nn.Conv3d: QATConv3d,
    nn.ConvTranspose1d: QATConvTranspose1d,
    nn.ConvTranspose2d: QATConvTranspose2d,
    nn.Embedding: QATEmbedding,
    nn.EmbeddingBag: QATEmbeddingBag,
}


def swap_of(kind: type[nn.Module]) -> type[QATLayer] | None:
    """Return the quantized class for a layer's exact type, or None."""
    if kind is NonDynamicallyQuantizableLinear:
        return QATOutputProjection
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return _transposed(kind)
    return SWAPS.get(kind)


_TRANSPOSED: dict[type[nn.Module], type[QATLayer]] = {}


def _transposed(kind: type[nn.Module]) -> type[QATLayer]:
    """Create the subclass of transformers' class on first use, without that import."""
    if kind not in _TRANSPOSED:
        _TRANSPOSED[kind] = type("QATConv1D", (QATTransposedLinear, kind), {"__doc__": QATTransposedLinear.__doc__})
    return _TRANSPOSED[kind]


def _new_transposed(kind: type[nn.Module]) -> QATLayer:
    made = _transposed(kind)
    return made.__new__(made)
