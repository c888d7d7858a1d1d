"""The arithmetic of quantization: one set of functions that training, export and verification all call.

Everything is computed in float32 whatever the tensor's dtype, as ``codes = round(clip(x / scale)) + zero_point``: clip
first, then round half to even, which is ONNX's QuantizeLinear and the order of the LSQ paper. Division, not
multiplication by a reciprocal: the two differ in the last bit, and the runtimes divide.

Scales are stored in the shapes of compressed-tensors: ``[1]`` per tensor, ``[out, 1]`` per channel,
``[out, groups]`` per group, ``[row blocks, column blocks]`` per block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qatkit.quantization.grids import from_codes, round_to_grid, to_codes
from qatkit.spec import FLOATS, QuantSpec


def blocks(x: Tensor, spec: QuantSpec) -> Tensor:
    """View `x` so that one scale belongs to one slice.

    Args:
        x: A weight ``[out, ...]``, or an activation of any shape.
        spec: Its quantization.

    Returns:
        ``x`` itself; ``[..., groups, group_size]`` with strategy "group"; with strategy "block"
        ``[row blocks, rows, column blocks, columns]``, zeros at the edges.
    """
    if spec.group_size is not None:
        return x.reshape(*x.shape[:-1], x.shape[-1] // spec.group_size, spec.group_size)
    if spec.block_structure is not None:
        rows, columns = spec.block_structure
        x = F.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
        return x.view(x.shape[0] // rows, rows, x.shape[1] // columns, columns)
    return x


def unblocked(grid: Tensor, shape: torch.Size, spec: QuantSpec) -> Tensor:
    """What `blocks` made, back in the shape it came from."""
    if spec.block_structure is not None:
        grid = grid.reshape(grid.shape[0] * grid.shape[1], -1)[: shape[0], : shape[1]]
    return grid.reshape(shape)


def aligned(scale: Tensor, x: Tensor, spec: QuantSpec) -> Tensor:
    """Reshape a stored scale (or zero point) so that it broadcasts over ``blocks(x, spec)``."""
    if spec.strategy == "channel":
        return scale.view(-1, *[1] * (x.dim() - 1))
    if spec.strategy == "block":
        return scale[:, None, :, None]
    return scale.unsqueeze(-1) if spec.strategy == "group" else scale


def value_range(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every slice that shares a scale, in float32 and the stored scale's shape."""
    x = x.detach()
    if spec.strategy == "tensor":
        low, high = torch.aminmax(x)
        return low.float().view(1), high.float().view(1)
    if spec.strategy == "channel":
        low, high = torch.aminmax(x.flatten(1), dim=1, keepdim=True)
    elif spec.strategy == "group":
        low, high = torch.aminmax(blocks(x, spec), dim=-1)
    elif spec.strategy == "block":
        low, high = torch.aminmax(blocks(x, spec).transpose(1, 2).flatten(2), dim=-1)
    else:  # a token is the last dimension
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
    return low.float(), high.float()


def choose_qparams(
    low: Tensor, high: Tensor, spec: QuantSpec, tensor_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of slices whose values lie in ``[low, high]``.

    A slice that is all zero gets the scale of the widest slice (1 if there is none), never 0 or NaN.

    Args:
        low: Smallest values, float32, any shape.
        high: Largest values, the same shape.
        spec: Bits, symmetry, scale rule and the dtype that scales are rounded to.
        tensor_scale: For scales of two levels, what `tensor_scale_of` gave; by default from these ranges.

    Returns:
        Scale and zero point (whole numbers), both float32 in the shape of `low`.

    Example:
        >>> import torch
        >>> spec = QuantSpec(num_bits=8, symmetric=False, strategy="tensor")
        >>> scale, zero_point = choose_qparams(torch.tensor([-0.3]), torch.tensor([1.2]), spec)
        >>> zero_point.item()
        51.0
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    largest = torch.maximum(-low, high)
    if spec.two_level and tensor_scale is None:
        tensor_scale = tensor_scale_of(largest, spec)
    if not spec.symmetric:
        scale = divided(high - low, spec.qmax)
    elif spec.scale_dtype == "float8_e8m0fnu":
        scale = _mx_scale(largest, spec)
    elif spec.scale_rule == "range":
        scale = divided(largest, (spec.qmax - spec.qmin) / 2)
    elif spec.scale_rule == "signed":
        scale = divided(torch.where(-low >= high, low, high), spec.qmin)
    else:
        scale = divided(largest, spec.qmax)
    widest = scale.abs().amax() if scale.numel() else scale.new_ones(())
    scale = torch.where(scale != 0, scale, torch.where(widest > 0, widest, torch.ones_like(widest)))
    scale = round_scale(scale, spec, tensor_scale)
    if spec.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, round_zero_point(-low / scale, spec)


def divided(x: Tensor, number: float) -> Tensor:
    """``x / number``, rounded once wherever `x` lives: a scale of training on a GPU is that of export on the CPU.

    By a Python number CUDA multiplies with its reciprocal, which is off in the last bit; by a tensor that lives on the
    GPU it divides. Inductor sees through such a tensor. In float64 the reciprocal's error is too small to change what a
    quotient of float32 by a number of few bits is rounded to: such a quotient is never that near to the middle of two.

    Args:
        x: float32.
        number: Of few bits, as the largest codes are.
    """
    if torch.compiler.is_compiling() and x.device.type == "cuda":
        return (x.double() / number).float()
    return x / x.new_full((), number)


def tensor_scale_of(largest: Tensor, spec: QuantSpec) -> Tensor:
    """The float32 scale over small-float scales: it puts the scale of the largest value at e4m3's largest number.

    It divides, as compressed-tensors' global scale does: a slice is scaled by ``e4m3 / tensor_scale``.

    Args:
        largest: Magnitudes, float32, any shape.
        spec: A spec with ``two_level`` scales.

    Returns:
        ``[1]``, float32.
    """
    largest = largest.amax().clamp(min=torch.finfo(torch.float32).tiny).view(1)
    scale = (FLOATS["float", 8][2] * spec.qmax) / largest
    return torch.where(scale.isfinite(), scale, torch.ones_like(scale))


def _mx_scale(largest: Tensor, spec: QuantSpec) -> Tensor:
    """A power of two that puts the largest value into the top binade of the element type (OCP MX 1.0, section 6.3).

    A value that would be nearer to the next power of two than to the largest code counts as that power, as
    compressed-tensors does it: from 1.75 (1.9375 with 6 bits, whose largest code is 1.875) times a power on.
    """
    top = FLOATS[spec.type, spec.num_bits][2]
    mantissa, exponent = torch.frexp(largest)
    carries = mantissa * 2 >= (1.9375 if spec.num_bits == 6 else 1.75)
    emax = torch.frexp(torch.tensor(top))[1].to(exponent.device)
    return torch.where(largest > 0, torch.exp2((exponent + carries.int() - emax).float().clamp(-127, 127)), 0.0)


def round_scale(scale: Tensor, spec: QuantSpec, tensor_scale: Tensor | None = None) -> Tensor:
    """Make a scale a number that ``spec.scale_dtype`` can hold, never zero; returned in float32.

    Only the signed rule has negative scales; elsewhere the magnitude counts. The smallest of float16 is 2**-24, its
    smallest subnormal: weights of 1e-5 would lose everything above it.
    """
    size = scale.float().abs()
    if spec.scale_dtype == "float8_e8m0fnu":
        # the nearest power of two by its logarithm; a logarithm itself would depend on the device in its last bit
        mantissa, exponent = torch.frexp(size.clamp(2.0**-126, 2.0**127))
        power = torch.exp2((exponent - (mantissa <= 0.5**0.5).int()).float())
        size = torch.where(size.isnan(), size, power)  # the exponent of NaN may be any
    elif spec.two_level:
        assert tensor_scale is not None
        # the reciprocal of float32's smallest numbers is infinite: what is kept finite is e4m3 / tensor_scale
        small = (size * tensor_scale).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).float()
        size = small / tensor_scale
    else:
        dtype = getattr(torch, spec.scale_dtype)
        smallest = 2.0**-24 if dtype is torch.float16 else torch.finfo(dtype).tiny
        size = size.clamp(smallest, torch.finfo(dtype).max)
        if dtype is not torch.float32:
            size = size.to(dtype).float()
    return torch.where(scale < 0, -size, size) if spec.scale_rule == "signed" else size


def round_zero_point(zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """The nearest whole number that is a code, so that zero stays zero."""
    return zero_point.round().clamp(spec.qmin, spec.qmax)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of `x` in its shape: int8 (symmetric), uint8 (asymmetric), float8, or uint8 bits of floats of 4 or 6 bits.

    Example:
        >>> import torch
        >>> spec = QuantSpec(8, symmetric=False, strategy="tensor")
        >>> x = torch.tensor([0.5, 1.2, -0.3, 0.8])
        >>> quantize(x, *choose_qparams(*value_range(x, spec), spec), spec).tolist()
        [136, 255, 0, 187]
    """
    grid = blocks(x.detach(), spec)
    scale, zero_point = aligned(scale, x, spec), aligned(zero_point, x, spec)
    values = _round_clipped(grid.float() / scale, zero_point, spec)
    return unblocked(to_codes(values, zero_point, spec), x.shape, spec)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """The values that codes stand for, ``(codes - zero_point) * scale``, in float32."""
    scale, zero_point = aligned(scale, codes, spec), aligned(zero_point, codes, spec)
    # blocks() pads with zeros, which float8 cannot be padded with
    grid = blocks(codes.view(torch.uint8), spec).view(codes.dtype)
    return unblocked(from_codes(grid, zero_point, spec) * scale, codes.shape, spec)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    gradient_scale: float = 1.0,
    clips: bool = True,
) -> Tensor:
    """``dequantize(quantize(x))`` in the dtype of `x`, with straight-through gradients.

    Where `x` lies inside the range its gradient passes unchanged, outside it is zero. The scale's gradient is
    equation 3 of LSQ (Esser et al., 2020, https://arxiv.org/abs/1902.08153): ``round(v) - v`` inside and the clipped
    code outside, with ``v = x / scale``, summed over the slice. The zero point's gradient is ``-scale`` outside and
    zero inside, which makes a learned offset that of LSQ+ (Bhalgat et al., 2020,
    https://arxiv.org/abs/2004.09576, equation 5).

    Args:
        x: Any float tensor.
        scale: In its stored shape, float32.
        zero_point: Whole numbers in float32, the shape of `scale`.
        spec: Type, bits, symmetry and strategy.
        gradient_scale: Multiplies the gradients of scale and zero point; LSQ takes ``1 / sqrt(slice size * qmax)``.
        clips: False says that the scale was computed from `x` itself and moves with it: the gradient is then the
            identity, and nothing is kept for the backward pass.
    """
    grid = blocks(x, spec)
    scale, zero_point = aligned(scale, x, spec), aligned(zero_point, x, spec)
    out: Tensor  # Function.apply is untyped in torch
    if clips:
        out = _FakeQuantize.apply(grid, scale, zero_point, spec, gradient_scale)  # type: ignore[no-untyped-call]
    else:
        out = _FakeQuantizeWithin.apply(grid, scale, zero_point, spec)  # type: ignore[no-untyped-call]
    return unblocked(out, x.shape, spec)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in a dtype, for what an autograd function returns.

    Of a `.to` that has nothing to convert torch.compile makes a result without a gradient, in torch 2.11 and with no
    word said.
    """
    return x if x.dtype == dtype else x.to(dtype)


def _round_clipped(v: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Round ``v = x / scale`` to the grid around zero; the zero point is added after, which keeps ties to even."""
    if spec.symmetric:
        return round_to_grid(v.clamp(spec.qmin, spec.qmax), spec)
    return torch.minimum(torch.maximum(v, spec.qmin - zero_point), spec.qmax - zero_point).round()


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, gradient_scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.spec, ctx.gradient_scale = spec, gradient_scale
        return in_dtype(_round_clipped(x.float() / scale, zero_point, spec) * scale, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        spec: QuantSpec = ctx.spec
        v = x.float() / scale
        inside = (v >= spec.qmin - zero_point) & (v <= spec.qmax - zero_point)
        grad_x = torch.where(inside, grad, 0)
        grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[1]:
            slope = _round_clipped(v, zero_point, spec) - torch.where(inside, v, 0)
            grad_scale = (grad.float() * slope).sum_to_size(scale.shape) * ctx.gradient_scale
        if ctx.needs_input_grad[2]:
            outside = torch.where(inside, 0, grad.float()).sum_to_size(zero_point.shape)
            grad_zero_point = outside * -scale * ctx.gradient_scale
        return grad_x, grad_scale, grad_zero_point, None, None


class _FakeQuantizeWithin(torch.autograd.Function):
    """Fake quantization of values that all lie inside the range: the straight-through gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
        return in_dtype(_round_clipped(x.float() / scale, zero_point, spec) * scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None
