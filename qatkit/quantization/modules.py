"""Layers that compute with quantized values: subclasses that take over a layer in place.

A swap changes the layer's class and adds the fake quantizers; the Parameter objects, the hooks and the identity of the
module stay. So optimizers, weight ties, `state_dict` keys and FSDP see the layer they knew.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.quantization.arithmetic import fake_quantize, round_scale
from qatkit.quantization.observers import RangeObserver, minmax_qparams, mse_qparams
from qatkit.spec import QuantSpec

Role = Literal["weight", "activation"]


class FakeQuantize(nn.Module):
    """Rounds a tensor to its grid in the forward pass and passes gradients straight through.

    Where the scale comes from follows the spec: computed from the tensor on every call (min-max weights, dynamic
    activations), frozen in a buffer (MSE weights, calibrated activations), or a learned Parameter (LSQ). A learned
    scale is made in its final shape here, so that DDP, FSDP2 and optimizers see it from the start.

    Args:
        spec: The quantization.
        role: "weight" or "activation".
        shape: Shape of the stored scale: ``[1]``, ``[out, 1]`` or ``[out, groups]``.
        device: Where the scale lives.
    """

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, spec: QuantSpec, role: Role, shape: tuple[int, ...], device: torch.device | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.role = role
        self.ran = False  # set by the first forward; a quantizer that stays False has never quantized anything
        self.observer: RangeObserver | None = None
        self.computed = spec.dynamic or (role == "weight" and spec.observer == "minmax")
        self.ready = self.computed
        if self.computed:
            self.scale = self.zero_point = None
            return
        initial = torch.full(shape, torch.nan, device=device)
        if spec.observer == "lsq":
            self.scale = nn.Parameter(initial)
        else:
            self.register_buffer("scale", initial)
        self.register_buffer("zero_point", torch.zeros(shape, device=device))

    def initialize(self, weight: Tensor) -> None:
        """Take the initial scale from a weight; nothing to do where it is computed on every call."""
        if not self.computed:
            self.set_qparams(*mse_qparams(weight, self.spec))

    @torch.no_grad()
    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Overwrite the stored scale and zero point, sharded or not."""
        assert self.scale is not None
        assert self.zero_point is not None
        _assign(self.scale, scale)
        _assign(self.zero_point, zero_point)
        self.ready = True

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point that `x` is quantized with, rounded as the exported file holds them (float32)."""
        if self.computed:
            return minmax_qparams(x, self.spec)
        assert self.scale is not None
        assert self.zero_point is not None
        scale: Tensor = _RoundScale.apply(self.scale, self.spec)  # type: ignore[no-untyped-call]
        return scale, self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        return self.with_scale(x)[0]

    def with_scale(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rounded tensor and the scale it was rounded with; `x` and None while calibration watches."""
        self.ran = True
        if self.observer is not None:
            self.observer.update(x)
            return x, None
        if not self.ready:
            raise RuntimeError(
                "a static activation scale is used before calibration; call qatkit.calibrate(model, batches) first, or "
                "let QuantizationAwareTraining do it: fit before validate, test and predict, or give them ckpt_path"
            )
        scale, zero_point = self.qparams(x)
        gradient_scale = self._gradient_scale(x, scale)
        return fake_quantize(x, scale, zero_point, self.spec, gradient_scale, clips=not self.computed), scale

    def _gradient_scale(self, x: Tensor, scale: Tensor) -> float:
        """LSQ, section 2.2: one over the root of (elements that share a scale, of one sample) times qmax."""
        size = x.numel() / max(scale.numel(), 1) if self.role == "weight" else x.numel() / max(x.shape[0], 1)
        return 1.0 / math.sqrt(max(size, 1) * self.spec.qmax)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.scale is not None:
            self.ready = not bool(full_tensor(self.scale).isnan().any())

    def extra_repr(self) -> str:
        kind = "int" if self.spec.symmetric else "uint"
        return f"{self.role}, {kind}{self.spec.num_bits}, {self.spec.strategy}, {self.spec.observer}"


class _RoundScale(torch.autograd.Function):
    """`round_scale` whose gradient passes through the rounding, with the sign of the absolute value."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, spec: QuantSpec) -> Tensor:
        ctx.save_for_backward(scale)
        return round_scale(scale, spec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return torch.where(scale < 0, -grad, grad), None


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded (a DTensor), as a plain detached tensor."""
    gather = getattr(tensor, "full_tensor", None)
    return cast(Tensor, gather()) if gather is not None else tensor.detach()


def _assign(target: Tensor, value: Tensor) -> None:
    value = value.to(target.device, target.dtype).view(target.shape)
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        target = cast(DTensor, target)
        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.copy_(value)


class QATLayer(nn.Module):
    """What every quantized layer shares: the two fake quantizers, either of which may be None."""

    weight: Tensor
    bias: Tensor | None
    weight_fake_quant: FakeQuantize | None
    input_fake_quant: FakeQuantize | None

    def fake_quantized_weight(self) -> Tensor:
        """The weight as the forward pass uses it, in the weight's own dtype."""
        return self.weight if self.weight_fake_quant is None else self.weight_fake_quant.with_scale(self.weight)[0]

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias as the forward pass uses them.

        Integer kernels add the bias to sums of products of codes, so it is a whole multiple of weight scale times input
        scale there. It is rounded so in training too: with 4-bit weights that grid is coarse enough to be seen at the
        output. Without a static input scale, or with several scales per output, runtimes add it in floating point.
        """
        weight, bias = self.weight, self.bias
        weight_scale = input_scale = None
        if self.weight_fake_quant is not None:
            weight, weight_scale = self.weight_fake_quant.with_scale(weight)
        if self.input_fake_quant is not None:
            x, input_scale = self.input_fake_quant.with_scale(x)
            if self.input_fake_quant.spec.dynamic:
                input_scale = None
        if bias is not None and input_scale is not None and weight_scale is not None and weight_scale.numel() in (
            1, len(bias)
        ):  # fmt: skip
            bias = _RoundToMultiple.apply(bias, (weight_scale * input_scale).view(-1))  # type: ignore[no-untyped-call]
        return x, weight, bias


class _RoundToMultiple(torch.autograd.Function):
    """The nearest multiple of a step, whose straight-through gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor) -> Tensor:
        steps = x.float() / step
        # from 2**23 on every float is whole; below a step of 1e-38 the quotient is infinite, and the value is kept too
        return torch.where(steps.abs() < 2**23, steps.round() * step, x.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class QATLinear(QATLayer, nn.Linear):
    """`nn.Linear` over a fake-quantized weight and input."""

    bias: Tensor | None  # type: ignore[assignment]  # torch says it is always there

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(*self.operands(input))


class QATConv2d(QATLayer, nn.Conv2d):
    """`nn.Conv2d` over a fake-quantized weight and input."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self._conv_forward(*self.operands(input)))


SWAPS: dict[type[nn.Module], type[QATLayer]] = {nn.Linear: QATLinear, nn.Conv2d: QATConv2d}
